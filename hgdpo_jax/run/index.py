"""The index of a run: what is in the files it reads, so that no file is read twice."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from hgdpo_jax.run import processes
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import Member, file_hash, write_json

Result = TypeVar("Result")


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

    def _entry(self, file: Path | Member) -> list[Any]:
        path, inside = (file.path, f"::{file.inside}") if isinstance(file, Member) else (file, "")
        about, name = path.stat(), os.path.abspath(path) + inside
        entry = self._known.setdefault(name, [None, None, None, None])
        if entry[:2] != [about.st_size, about.st_mtime_ns]:
            entry[:] = [about.st_size, about.st_mtime_ns, None, None]
        return entry

    def hash(self, file: Path | Member) -> str:
        """sha256 of a file, or of a picture in one. Raises OSError where it cannot be read."""
        entry = self._entry(file)
        if entry[2] is None:
            digest = hashlib.sha256(file.read()).hexdigest() if isinstance(file, Member) else file_hash(file)
            entry[2], self._saved = digest, False
        return entry[2]

    def shape(self, picture: Path | Member, measure: Callable[[Path | Member], tuple[int, int]]) -> tuple[int, int]:
        """(height, width) of a picture, which `measure` opens unless its shape is known; what it raises is raised."""
        entry = self._entry(picture)
        if entry[3] is None:
            entry[3], self._saved = list(measure(picture)), False
        return tuple(entry[3])

    def save(self) -> None:
        """Writes it where something was learnt since it was read."""
        if self._path is not None and self._keep and not self._saved:
            write_json(self._path, self._known, indent=None)
            self._saved = True


def index_of_run(workdir: Path) -> Index:
    """The index of a run, which process 0 writes."""
    return Index(workdir / "content.json", keep=processes.is_first())


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
