"""A folder is written by one command at a time."""

import fcntl
import itertools
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

_ATTEMPTS = 100


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
    try:
        file = _locked(path, folder, wait=False)
    except UserError:
        _remove_empty(made)
        raise
    if file is None:
        raise UserError(f"{folder}: is being written by {lock_owner(folder) or 'another command'}; wait until that "
                        "has ended, or choose another folder")  # fmt: skip
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


@contextmanager
def turn(path: Path) -> Iterator[None]:
    """Until the block ends no other process has its turn at `path`, a file that many add to. Waits for its own.

    Raises:
        UserError: nothing can be written there.
    """
    beside = path.with_name(f".{path.name}.lock")
    file = _locked(beside, path, wait=True)
    assert file is not None
    with file:
        try:
            yield
        finally:
            beside.unlink(missing_ok=True)


def _locked(path: Path, what: Path, wait: bool) -> TextIO | None:
    """The file `path`, which is the lock of `what`; None where another has it and this one does not wait.

    Raises:
        UserError: nothing can be written there.
    """
    for attempt in itertools.count():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+")
        except OSError as error:
            if isinstance(error, FileNotFoundError) and attempt < _ATTEMPTS:
                continue  # its owner ended, and took the folder away
            raise UserError(f"{what}: cannot be written ({error.strerror}); choose another folder") from error
        if not _lock(file.fileno(), path, wait):
            file.close()
            return None
        if path.is_file() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()  # its owner ended between our opening and locking, and took the name away
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


def _lock(descriptor: int, path: Path, wait: bool = False) -> bool:
    """Whether the lock was free, or is now. Raises UserError on a file system without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
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
