"""The index of a run: what is in the files it reads, so that no file is read twice."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import Member, file_hash, write_json


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
        held_by = file.path if isinstance(file, Member) else file
        about, name = (
            held_by.stat(),
            os.path.abspath(held_by) + (f"::{file.inside}" if isinstance(file, Member) else ""),
        )
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
        """(height, width) of a picture.

        Args:
            picture: of which `measure` says it, unless it is known.
            measure: opens the picture; what it raises is raised.
        """
        entry = self._entry(picture)
        if entry[3] is None:
            entry[3], self._saved = list(measure(picture)), False
        return tuple(entry[3])

    def save(self) -> None:
        """Writes what was learnt since it was read."""
        if self._path is not None and self._keep and not self._saved:
            write_json(self._path, self._known, indent=None)
            self._saved = True
