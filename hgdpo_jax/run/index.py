"""The index of a run: what is in the files it reads, so that no file is read twice."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from hgdpo_jax.run import processes
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import Member, file_hash, retried, write_json
from hgdpo_jax.run.locks import turn
from hgdpo_jax.run.progress import Progress

Result = TypeVar("Result")
_THREADS = 8  # that read files: a server answers several as fast as one
_AT_ONCE = 4096  # files, after which what was learnt is kept


class Index:
    """Content of files and shapes of pictures, kept between runs: a file is read again only once its size or its time
    of modification has changed.

    Any number of processes, of one command or of several, may keep theirs in one file: none loses what another learnt.

    Args:
        path: where it is kept; None keeps it in memory.
        writes: whether what is learnt is kept there.
    """

    def __init__(self, path: Path | None = None, writes: bool = True) -> None:
        self._path, self._writes = path, writes
        self._known: dict[str, list[Any]] = {}  # path → [size, modification time in ns, sha256, [height, width]]
        self._learnt: set[str] = set()  # what is not kept yet
        self.read()

    def read(self) -> None:
        """Reads what is kept, of other processes too."""
        if self._path is None or not self._path.is_file():
            return
        try:
            kept = json.loads(retried(self._path.read_text, self._path))
            if not all(isinstance(entry, list) and len(entry) == 4 for entry in kept.values()):
                raise ValueError("an entry is no list of four")
        except (ValueError, AttributeError) as error:
            raise UserError(f"{self._path}: not JSON ({error}); remove it, it will be made again") from error
        self._known = kept | {name: self._known[name] for name in self._learnt}

    def _entry(self, file: Path | Member) -> tuple[str, list[Any]]:
        """Name and entry of a file as it is now."""
        path, inside = (file.path, f"::{file.inside}") if isinstance(file, Member) else (file, "")
        about, name = path.stat(), os.path.abspath(path) + inside
        entry = self._known.setdefault(name, [None, None, None, None])
        if entry[:2] != [about.st_size, about.st_mtime_ns]:
            entry[:] = [about.st_size, about.st_mtime_ns, None, None]
        return name, entry

    def hash(self, file: Path | Member) -> str:
        """sha256 of a file, or of a picture in one.

        Raises:
            OSError: there is none, or it may not be read.
            UserError: the disk or the file server does not answer; see :func:`hgdpo_jax.run.files.retried`.
        """

        def found() -> str:
            name, entry = self._entry(file)
            if entry[2] is None:
                entry[2] = hashlib.sha256(file.read()).hexdigest() if isinstance(file, Member) else file_hash(file)
                self._learnt.add(name)
            return entry[2]

        return retried(found, file)

    def learn(self, files: Iterable[Path | Member]) -> None:
        """Hashes many files, several at a time and with a progress bar, so that :meth:`hash` then knows them. Those
        that there are not, or that may not be read, are passed over.

        Raises:
            UserError: see :meth:`hash`.
        """

        def one(file: Path | Member) -> None:
            with suppress(OSError, ValueError):
                self.hash(file)

        listed = list(dict.fromkeys(files))
        bar = Progress(total=len(listed), desc="files", unit="file", leave=False, delay=2)
        with bar, ThreadPoolExecutor(_THREADS) as threads:
            for begin in range(0, len(listed), _AT_ONCE):
                for _ in threads.map(one, listed[begin : begin + _AT_ONCE]):
                    bar.update()
                if len(self._learnt) >= _AT_ONCE:
                    self.save()

    def shape(self, picture: Path | Member, measure: Callable[[Path | Member], tuple[int, int]]) -> tuple[int, int]:
        """(height, width) of a picture, which `measure` opens unless its shape is known; what it raises is raised."""
        name, entry = retried(lambda: self._entry(picture), picture)
        if entry[3] is None:
            entry[3] = list(measure(picture))
            self._learnt.add(name)
        return tuple(entry[3])

    def save(self) -> None:
        """Adds what was learnt to what is kept."""
        if self._path is None or not self._writes or not self._learnt:
            return
        with turn(self._path):
            self.read()
            write_json(self._path, self._known, indent=None)
        self._learnt.clear()


def index_of_run(workdir: Path, writes: bool = True) -> Index:
    """The index of a run; `writes` as in :class:`Index`."""
    return Index(workdir / "content.json", writes)


def first_process_first(index: Index, work: Callable[[], Result]) -> Result:
    """The same work on every process: on process 0 first, whose index the others then read, so that they need not look
    into files themselves."""
    if processes.is_first():
        found = work()
        index.save()
        processes.barrier()
        return found
    processes.barrier()
    index.read()
    return work()
