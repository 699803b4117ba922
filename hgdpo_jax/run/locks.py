"""A folder is written by one command at a time."""

import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TextIO

from hgdpo_jax.run import processes
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import LOCK


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Until the block ends no other command may own `folder`, which is made unless it is there, and taken away again
    where nothing was written.

    The lock is the kernel's, which drops it with its process: a dead owner's is taken over by itself. The file says
    whose it is. It lies in the folder, since what is around that may be another user's.

    Raises:
        UserError: another command owns it, or nothing can be written there.
    """
    path = folder.absolute() / LOCK
    made = [place for place in (path.parent, *path.parent.parents) if not os.path.lexists(place)]
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = _open(path)
        except OSError as error:
            _remove_empty(made)
            raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from error
        if file is None:  # its owner ended, and took the folder away
            continue
        if not _lock(file.fileno(), path):
            file.close()
            raise UserError(f"{folder}: is being written by {lock_owner(folder) or 'another command'}; wait until that "
                            "has ended, or choose another folder")  # fmt: skip
        if path.is_file() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # its owner ended between our opening and locking, and took the name away
    try:
        with file:
            file.truncate(0)
            about = {"host": socket.gethostname(), "pid": os.getpid(), "command": Path(sys.argv[0]).stem}
            file.write(json.dumps(about) + "\n")
            file.flush()
            yield
    finally:
        path.unlink(missing_ok=True)
        _remove_empty(made)


def _open(path: Path) -> TextIO | None:
    """None where there is no such folder."""
    try:
        return path.open("a+")
    except FileNotFoundError:
        return None


def _remove_empty(folders: Sequence[Path]) -> None:
    """Takes folders away in which nothing is, the innermost first."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def lock_for_all(folder: Path) -> Iterator[None]:
    """As :func:`lock`, for all processes of a command: process 0 owns the folder, and they begin and end together."""
    with lock(folder) if processes.is_first() else nullcontext():
        processes.barrier()
        yield
        processes.barrier()


def _lock(descriptor: int, path: Path) -> bool:
    """Whether the lock was free. Raises UserError on a file system without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(f"{path}: cannot be locked ({error.strerror}); choose another file system") from error
    return True


def lock_owner(folder: Path) -> str | None:
    """Which command owns a folder, in words; None where none does."""
    path = folder.absolute() / LOCK
    try:
        with path.open("r+") as file:  # of a file that is open for reading alone NFS gives no such lock
            if _lock(file.fileno(), path):
                return None
            about = json.loads(file.read() or "{}")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:  # another user's, or read-only here
        return "another command"
    if not about:
        return "another command"
    return f"{about['command']} (process {about['pid']} on {about['host']})"
