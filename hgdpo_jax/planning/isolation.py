"""A process for one answer, which ends with it, whatever its threads are still doing."""

import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from hgdpo_jax.run.errors import UserError

T = TypeVar("T")


def in_subprocess(make: Callable[..., T], *arguments: Any) -> T:
    """What a function gives, or raises, in a process of its own; what it leaves in `tempfile.gettempdir()` is removed.

    Args:
        make: of a module.
        *arguments: that can be pickled, as the answer can.

    Raises:
        UserError: the system ended that process.
    """
    context = multiprocessing.get_context("spawn")
    answers, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        process = context.Process(target=_answer, args=(theirs, folder, make, arguments))
        process.start()
        theirs.close()
        try:
            answer, error, trace = answers.recv()
        except EOFError:
            process.join()
            raise UserError(f"the process that compiles was ended with {process.exitcode}; where memory ran out (-9) "
                            "it takes a machine with more") from None  # fmt: skip
        finally:
            process.kill()
            process.join()
    if error:
        raise error from RuntimeError(trace)
    return answer


def _answer(there: Connection, folder: str, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    tempfile.tempdir = folder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C comes to both; this one ends with the other
    threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()
    try:
        there.send((make(*arguments), None, ""))
    except Exception as error:
        there.send((None, error, traceback.format_exc()))


def _end_with_parent(folder: str) -> None:
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)
