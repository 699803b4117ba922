"""What a command says, and to whom: three descriptors and two streams that it can rely on."""

import errno
import io
import locale
import logging
import os
import sys
from typing import Any


def prepare() -> None:
    """Called before a command does anything else.

    - A locale that is not UTF-8 would be that of every file and of every library: Python begins anew in its UTF-8 mode.
    - A descriptor that the caller closed becomes /dev/null. The next file would take its number, and what libraries
      print would be written into it.
    - A reader that goes away (`| head -1`) ends nothing: what is said to it later is dropped. So is what an output
      cannot encode, of which the escape is written.
    - A warning is a line without the name of a logger.
    """
    if not sys.flags.utf8_mode and locale.getencoding().lower() not in ("utf-8", "utf8"):
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    # A program that has streams of its own keeps them.
    if sys.stdout is sys.__stdout__:
        sys.stdout = _patient(sys.stdout, 1)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _patient(sys.stderr, 2)
    logging.basicConfig(format="%(levelname)s: %(message)s")


def _patient(stream: Any, descriptor: int) -> io.TextIOWrapper:
    """A stream that encodes as `stream`, which may be None, and outlives its reader."""
    if stream is not None:
        stream.flush()
    raw: Any = _Patient(descriptor, "w", closefd=False)
    at_once = getattr(stream, "write_through", False)  # python -u
    return io.TextIOWrapper(
        raw if at_once else io.BufferedWriter(raw),
        encoding=getattr(stream, "encoding", "utf-8"),
        errors="backslashreplace",
        line_buffering=True,  # in a log too, where lines of both streams stand in their order
        write_through=at_once,
    )


class _Patient(io.FileIO):
    """What is written once nobody reads is dropped."""

    def write(self, data: Any) -> int:
        """Bytes written or dropped."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # a pipe without a reader, a terminal that was closed
                raise
            return memoryview(data).nbytes
