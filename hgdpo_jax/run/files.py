"""Files: written completely or not at all, and known by their content."""

import codecs
import errno
import hashlib
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from etils import epath

from hgdpo_jax.run.errors import UserError

AnyPath: TypeAlias = Path | epath.Path  # on a file system, or in a bucket
Result = TypeVar("Result")
PACKAGE = Path(__file__).parent.parent
LOCK, _PARTIAL = ".lock", ".partial"  # in a folder that a command writes, see run/locks.py and :func:`filled`
# What the machine, its disk or a file server answers while it is in trouble; of the file it says nothing.
_PASSING = {errno.ESTALE, errno.EIO, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ENOMEM}
_PASSING |= {errno.ENOBUFS, errno.ENOLCK, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENOTCONN, errno.ECONNRESET}
_PASSING |= {errno.ECONNABORTED, errno.ECONNREFUSED, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN}
_PASSING |= {errno.ENETRESET, errno.ENETUNREACH, errno.EPIPE, errno.ESHUTDOWN}
_WAITS = (1, 3, 10, 30)  # seconds between the tries


@dataclass(frozen=True)
class Member:
    """Bytes inside a file: of an archive, or of a table."""

    path: Path  # of the file that holds it
    inside: str  # its name there
    read: Callable[[], bytes] = field(compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.path}, {self.inside}"


def shipped(folder: str) -> Path:
    """`configs` or `tools`: inside the package where it was installed, beside it in a checkout."""
    inside = PACKAGE / folder
    return inside if inside.is_dir() else PACKAGE.parent / folder


def in_bucket(path: AnyPath) -> bool:
    """Whether a path is an address of object storage: an object appears whole, and is on the disk when it appears."""
    return "://" in str(path)


def sync(path: AnyPath) -> None:
    """Waits until a file, or a folder with all that is below it, is on the disk."""
    if in_bucket(path):
        return
    for entry in [*Path(path).rglob("*"), Path(path)]:  # a file has nothing below it
        _sync_entry(entry)


def _sync_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Mounted buckets have no folders that could be flushed.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def atomic_path(path: Path, shared: bool = False) -> Iterator[Path]:
    """A name beside `path`, under which the block writes a file or a folder. After the block that is on the disk and
    takes the name `path`; after an error nothing is left of it.

    Args:
        path: what is written.
        shared: several processes may write it at once: each under a name of its own, the last one stays.
    """
    temporary = path.with_name(f".partial.{path.name}" + (f".{secrets.token_hex(4)}" if shared else ""))
    _remove(temporary)
    try:
        yield temporary
        sync(temporary)
        if path.is_dir():
            path.rmdir()  # only an empty one can be replaced
        os.replace(temporary, path)
    except BaseException as error:
        _remove(temporary)
        error.add_note(f"while {path} was written")
        raise
    _sync_entry(path.parent)  # the new name itself


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def filled(folder: Path, mark: str, about: Mapping[str, Any]) -> Iterator[Path]:
    """A folder in `folder`, in which the block writes. After the block that is on the disk and moves up; after an error
    nothing is left of it. `folder` itself stays what it is, which may be a mount or the working directory.

    Args:
        folder: that the command owns, and that is empty.
        mark, about: name and content of a JSON file that moves up last: where it is, all is.
    """
    part = folder / _PARTIAL
    _remove(part)
    try:
        part.mkdir()
        yield part
        sync(part)
        write_json(part / mark, about)
    except BaseException as error:
        _remove(part)
        error.add_note(f"while {folder} was written")
        raise
    finish_filling(folder, mark)


def finish_filling(folder: Path, mark: str) -> None:
    """Moves up what :func:`filled` had written whole when it was killed."""
    part = folder / _PARTIAL
    if (part / mark).is_file():
        for entry in sorted(part.iterdir(), key=lambda entry: entry.name == mark):
            os.replace(entry, folder / entry.name)
        _sync_entry(folder)
    _remove(part)


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing but what a command has begun there, and what comes with a new file system."""
    return {entry.name for entry in folder.iterdir()} <= {LOCK, _PARTIAL, "lost+found"}


def write_json(path: AnyPath, value: Mapping[str, Any], indent: int | None = 2, shared: bool = False) -> None:
    """Writes readable JSON, and makes the folder; `shared` as in :func:`atomic_path`."""
    text = json.dumps(value, indent=indent, sort_keys=True) + "\n"
    if in_bucket(path):
        path.write_text(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(Path(path), shared) as temporary:
        temporary.write_text(text)


@contextmanager
def as_written(what: object, remedy: str) -> Iterator[None]:
    """The block reads what a command wrote as JSON, and takes from it what has to be there.

    Raises:
        UserError: `what`, such as a file, is not what a command writes; `remedy` says what to do.
    """
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{what}: is not as it was written ({reason}); {remedy}") from error


def is_passing(error: BaseException) -> bool:
    """Whether an error is of the machine, its disk or a file server, and not of the file that was read."""
    return isinstance(error, OSError) and error.errno in _PASSING


def retried(read: Callable[[], Result], path: object) -> Result:
    """What `read` returns. It is called again, for three quarters of a minute, after an error that may pass.

    Args:
        read: reads a file; what else it raises is raised.
        path: names the file.

    Raises:
        UserError: the error did not pass.
    """
    for wait in (*_WAITS, None):
        try:
            return read()
        except OSError as error:
            if not is_passing(error):
                raise
            if wait is None:
                line = (
                    f"{path}: cannot be read ({error.strerror}), nor could it be for {sum(_WAITS)} s; see to the disk"
                )
                raise UserError(f"{line} or the file server, the same command then goes on") from error
            logging.warning("%s: cannot be read (%s); trying again in %d s", path, error.strerror, wait)
            time.sleep(wait)
    raise AssertionError


def file_hash(path: AnyPath) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(path: Path) -> str:
    """sha256 of a file's size, first and last megabyte: tells files of weights apart without reading all of it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(2**20)
        file.seek(max(0, size - 2**20))
        return hashlib.sha256(str(size).encode() + first + file.read()).hexdigest()


def json_hash(value: Any) -> str:
    """sha256 of a value that JSON can hold, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def require_space(folder: AnyPath, size: float, what: str) -> None:
    """Raises UserError unless `size` bytes are free where `folder` is. A bucket has room."""
    if in_bucket(folder):
        return
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(f"{folder}: {free / 1e3:,.0f} kB free, {what} needs {size / 1e3:,.0f}; free some disk space")


def read_lines(path: Path) -> list[tuple[int, str]]:
    """(number, text) of the lines of a text file that are not blank. A line ends at a line feed and nowhere else.

    Raises:
        UserError: no such file, or not UTF-8, with or without a byte order mark.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    found = []
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        try:
            text = line.decode().strip()
        except UnicodeDecodeError as error:
            raise UserError(f"{path} line {number}: is not UTF-8 ({error.reason}); save the file as UTF-8") from error
        if text:
            found.append((number, text))
    return found
