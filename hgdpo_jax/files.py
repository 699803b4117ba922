"""Files: written whole or not at all, by one command at a time, and known by their content."""

import codecs
import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
from etils import epath

from hgdpo_jax.errors import UserError
from hgdpo_jax.images import Picture, image_shape


def _partial(path: Path) -> Path:
    return path.with_name(f".partial.{path.name}")


def in_bucket(path: Path) -> bool:
    """Whether a path is an address of object storage: an object appears whole, and is on the disk when it appears."""
    return "://" in str(path)


def sync(path: Path) -> None:
    """Waits until a file, or a folder with all that is below it, is on the disk."""
    if in_bucket(path):
        return
    for entry in [*Path(path).rglob("*"), path]:  # a file has nothing below it
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
def whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write a file or a folder under. Once the block ends without an error, what is there is on
    the disk and takes the name `path`; after an error nothing is left of it."""
    temporary = _partial(path)
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


def write_json(path: Path, value: Mapping[str, Any], indent: int | None = 2) -> None:
    """Readable JSON; makes the folder. Also in a bucket."""
    text = json.dumps(value, indent=indent, sort_keys=True) + "\n"
    if in_bucket(path):
        path.write_text(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as temporary:
        temporary.write_text(text)


def file_hash(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def ends(path: Path) -> str:
    """sha256 of a file's size, its first and its last megabyte: tells files of weights apart without reading all."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(2**20)
        file.seek(max(0, size - 2**20))
        return hashlib.sha256(str(size).encode() + first + file.read()).hexdigest()


def json_hash(value: Any) -> str:
    """sha256 of a value that JSON can hold, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def need_space(folder: Path, size: float, what: str) -> None:
    """Raises UserError unless `size` bytes are free where `folder` is. A bucket has room."""
    if in_bucket(folder):
        return
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(f"{folder}: {free / 1e3:,.0f} kB free, {what} needs {size / 1e3:,.0f}; free some disk space")


def folder(text: str) -> Path:
    """A folder as a command line names it.

    Raises:
        UserError: an address of object storage, which knows neither renames nor locks.
    """
    if "://" in text:
        raise UserError(f"{text}: is object storage, which has no renames and locks; give a folder on a file system "
                        "that all hosts mount: NFS, Lustre, Filestore (gcsfuse is for photographs only). Checkpoints "
                        "may lie in a bucket: --config.train.checkpoints=gs://bucket/folder")  # fmt: skip
    return Path(text)


def bucket(address: str, key: str) -> epath.Path:
    """A folder in object storage, which need not exist.

    Args:
        address: gs://bucket/folder.
        key: of the config that gives it.

    Raises:
        UserError: the package that reaches it is not installed, or it cannot be read.
    """
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"config key {key}={address}: needs the package gcsfs; pip install -e '.[gcs]'")
    # Other processes, and TensorStore, write there too: what was listed before is out of date.
    fsspec.config.conf["gcs"] = {"use_listings_cache": False}
    with _reached(address, key), suppress(FileNotFoundError):
        list(epath.Path(address).iterdir())
    return epath.Path(address)


def require_writable(address: str, key: str) -> None:
    """Raises UserError where nothing can be written in a folder of :func:`bucket`."""
    with _reached(address, key):
        (epath.Path(address) / ".written").write_text("")
        (epath.Path(address) / ".written").unlink()


@contextmanager
def _reached(address: str, key: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of gcsfs, of Google's packages and of the network, which share no class
        raise UserError(f"config key {key}={address}: cannot be reached ({' '.join(str(error).split())}); give a "
                        "bucket that this host's credentials may read and write") from error  # fmt: skip


def require_plain(workdir: Path) -> None:
    """Raises UserError for a folder whose path Orbax would take for a pattern: it deletes what it has just written."""
    found = sorted(set(str(workdir.absolute())) & set("[]*?"))
    if found:
        raise UserError(f"--workdir {workdir}: its path holds {' '.join(found)}, which checkpoints cannot be written "
                        "under; choose another folder")  # fmt: skip


@contextmanager
def owned(folder: Path) -> Iterator[None]:
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
            raise UserError(f"{folder}: is being written by {owner(folder) or 'another command'}; wait until that has "
                            "ended, or choose another folder")  # fmt: skip
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


def owner(folder: Path) -> str | None:
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


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a text file that are not blank, with their numbers. They end at a line feed and nowhere else.

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


class Index:
    """Content of files and shapes of pictures, kept between runs: a file is read again only once its size or its time
    of modification has changed.

    Args:
        path: where it is kept; None keeps it in memory.
        keep: whether this process writes it.
    """

    def __init__(self, path: Path | None = None, keep: bool = True) -> None:
        self._path, self._keep = path, keep
        self._known: dict[str, list[Any]] = {}  # path → [size, modification time in ns, sha256, [height, width]]
        self._saved = True
        self.read()

    def read(self) -> None:
        """Reads what is kept, perhaps of another process."""
        if self._path is not None and self._path.is_file():
            try:
                self._known = json.loads(self._path.read_text())
            except json.JSONDecodeError as error:
                raise UserError(f"{self._path}: not JSON ({error}); remove it, it will be made again") from error

    def _entry(self, file: Path | Picture) -> list[Any]:
        held_by = file.path if isinstance(file, Picture) else file
        about, name = (
            held_by.stat(),
            os.path.abspath(held_by) + (f"::{file.inside}" if isinstance(file, Picture) else ""),
        )
        entry = self._known.setdefault(name, [None, None, None, None])
        if entry[:2] != [about.st_size, about.st_mtime_ns]:
            entry[:] = [about.st_size, about.st_mtime_ns, None, None]
        return entry

    def hash(self, file: Path | Picture) -> str:
        """sha256 of a file, or of a picture in one. Raises OSError where it cannot be read."""
        entry = self._entry(file)
        if entry[2] is None:
            digest = hashlib.sha256(file.read()).hexdigest() if isinstance(file, Picture) else file_hash(file)
            entry[2], self._saved = digest, False
        return entry[2]

    def shape(self, picture: Path | Picture) -> tuple[int, int]:
        """(height, width) of a picture as it is to be looked at. Raises OSError or UnreadableImage where it is none."""
        entry = self._entry(picture)
        if entry[3] is None:
            entry[3], self._saved = list(image_shape(picture)), False
        return tuple(entry[3])

    def save(self) -> None:
        """Writes what was learnt since it was read."""
        if self._path is not None and self._keep and not self._saved:
            write_json(self._path, self._known, indent=None)
            self._saved = True
