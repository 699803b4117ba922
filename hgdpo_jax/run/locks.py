"""A folder is written by one command at a time."""

import fcntl
import itertools
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TextIO

from hgdpo_jax.run import processes
from hgdpo_jax.run.errors import UserError

_ATTEMPTS = 100


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Until the block ends no other command may own `folder`, which need not exist.

    The lock is the kernel's, which drops it with its process: a dead owner's is taken over by itself. The file beside
    the folder says whose it is. Of the folders above, those that were made for that file and got nothing else go again.

    Raises:
        UserError: another command owns it, or nothing can be written there.
    """
    path = _lock_of(folder)
    made = [parent for parent in path.parents if not parent.exists()]
    file = _opened(path, folder, wait=False)
    if file is None:
        raise UserError(f"{folder}: is being written by {lock_owner(folder) or 'another command'}; wait until that "
                        "has ended, or choose another folder")  # fmt: skip
    with file:
        file.truncate(0)
        about = {"host": socket.gethostname(), "pid": os.getpid(), "command": Path(sys.argv[0]).stem}
        file.write(json.dumps(about) + "\n")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with suppress(OSError):  # something is in it
                for parent in made:
                    parent.rmdir()


@contextmanager
def turn(path: Path) -> Iterator[None]:
    """Until the block ends no other process has its turn at `path`, a file that many add to. Waits for its own.

    Raises:
        UserError: nothing can be written there.
    """
    file = _opened(_lock_of(path), path, wait=True)
    assert file is not None
    with file:
        try:
            yield
        finally:
            _lock_of(path).unlink(missing_ok=True)


def _opened(path: Path, what: Path, wait: bool) -> TextIO | None:
    """The file `path`, locked for `what`; None where another has the lock and this one does not wait."""
    for attempt in itertools.count():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+")
        except OSError as error:
            if isinstance(error, FileNotFoundError) and attempt < _ATTEMPTS:
                continue  # another command has just taken away the folder that it had made
            raise UserError(f"{what}: cannot be written ({error.strerror}); choose another folder") from error
        if not _lock(file.fileno(), path, wait):
            file.close()
            return None
        if path.is_file() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()  # its owner ended between our opening and locking, and took the name away
    return None


@contextmanager
def lock_for_all(folder: Path) -> Iterator[None]:
    """As :func:`lock`, for all processes of a command: process 0 owns the folder, and they begin and end together."""
    with lock(folder) if processes.is_first() else nullcontext():
        processes.barrier()
        yield
        processes.barrier()


def _lock_of(folder: Path) -> Path:
    return folder.absolute().parent / f".{folder.absolute().name}.lock"


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
    path = _lock_of(folder)
    try:
        with path.open("r+") as file:  # of a file that is open for reading alone NFS gives no such lock
            if _lock(file.fileno(), path):
                return None
            about = json.loads(file.read() or "{}")
    except FileNotFoundError:
        return None
    except PermissionError:  # another user's
        return "another command"
    if not about:
        return "another command"
    return f"{about['command']} (process {about['pid']} on {about['host']})"
