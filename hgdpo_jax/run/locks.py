"""A folder is written by one command at a time."""

import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from hgdpo_jax.run import processes
from hgdpo_jax.run.errors import UserError


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Until the block ends no other command may own `folder`, which need not exist.

    The lock is the kernel's, which drops it with its process: a dead owner's is taken over by itself. The file beside
    the folder says whose it is.

    Raises:
        UserError: another command owns it, or nothing can be written there.
    """
    path = _lock_of(folder)
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+")
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from error
        if not _lock(file.fileno(), path):
            file.close()
            raise UserError(f"{folder}: is being written by {lock_owner(folder) or 'another command'}; wait until that "
                            "has ended, or choose another folder")  # fmt: skip
        if path.is_file() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # its owner ended between our opening and locking, and took the name away
    with file:
        file.truncate(0)
        about = {"host": socket.gethostname(), "pid": os.getpid(), "command": Path(sys.argv[0]).stem}
        file.write(json.dumps(about) + "\n")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def lock_for_all(folder: Path) -> Iterator[None]:
    """As :func:`lock`, for all processes of a command: process 0 owns the folder, and they begin and end together."""
    with lock(folder) if processes.is_first() else nullcontext():
        processes.barrier()
        yield
        processes.barrier()


def _lock_of(folder: Path) -> Path:
    return folder.absolute().parent / f".{folder.absolute().name}.lock"


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
