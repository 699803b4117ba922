"""Rows that are computed once, before a stage's first step, and kept beside its pairs.

W/stageN/FOLDER/made_from.json   what they depend on, with the first of them
W/stageN/FOLDER/NAME.npy         some of them
W/stageN/FOLDER/NAME.npy.json    its hash, written once the file is complete
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hgdpo_jax.run import processes, provenance
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import as_written, atomic_path, file_hash, require_space, write_json
from hgdpo_jax.run.index import Index


class Rows(NamedTuple):
    """The rows of a file; a dtype that NumPy does not know, such as bfloat16, is bytes there."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def note(self) -> Path:
        return self.path.with_name(f"{self.path.name}.json")

    @property
    def size(self) -> int:
        """Bytes of the rows."""
        return math.prod(self.shape) * self.dtype.itemsize


def missing(folder: Path, files: Sequence[Rows], made_from: Mapping[str, Any], what: str) -> list[int]:
    """The numbers of those files that are to be computed, for which there is room.

    Raises:
        UserError: the folder holds rows that were made from something else, or does not say from what; the disk is
            full. `what` names the rows.
    """

    def found() -> list[int]:
        _require_same(folder, made_from)
        numbers = [i for i, rows in enumerate(files) if not rows.note.is_file()]
        require_space(folder.parent, sum(files[i].size for i in numbers) + 1e6, what)
        return numbers

    return processes.broadcast(found)


def _require_same(folder: Path, made_from: Mapping[str, Any]) -> None:
    path, remedy = folder / "made_from.json", "remove its folder, and it is computed again"
    if path.is_file():
        with as_written(path, remedy):
            found = {**json.loads(path.read_text())}
        provenance.require_same(found, made_from, str(folder), "use that, or remove the folder to compute it again")
    elif any(folder.glob("*.npy.json")):
        raise UserError(f"{path}: is missing, so nothing says what the files beside it are of; {remedy}")


@contextmanager
def written(rows: Rows, made_from: Mapping[str, Any]) -> Iterator[np.ndarray]:
    """Yields the rows of a file to be filled. The file and its note are there once the block ends without an error, and
    the folder then says what it was made from."""
    rows.path.parent.mkdir(exist_ok=True)
    with atomic_path(rows.path) as temporary:
        values = np.lib.format.open_memmap(temporary, mode="w+", dtype=rows.dtype, shape=rows.shape)
        with temporary.open("r+b") as file:  # a disk that fills up while a mapping is written would end the process
            os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
        yield values
        values.flush()
    write_json(rows.path.with_name("made_from.json"), made_from)
    write_json(rows.note, {"sha256": file_hash(rows.path)}, indent=None)


def opened(files: Sequence[Rows], index: Index) -> list[np.ndarray]:
    """The rows of files that are all there, read when asked for.

    Raises:
        UserError: one was altered.
    """
    processes.broadcast(lambda: _require_undamaged(files, index))
    return [np.load(rows.path, mmap_mode="r", allow_pickle=False).view(rows.dtype) for rows in files]


def _require_undamaged(files: Sequence[Rows], index: Index) -> None:
    for rows in files:
        with as_written(rows.note, "remove it, and its file is computed again"):
            known = json.loads(rows.note.read_text())["sha256"]
        if not rows.path.is_file() or index.hash(rows.path) != known:
            raise UserError(f"{rows.path}: missing or altered (its hash is not that of its note); remove it and its "
                            "note, and it is computed again")  # fmt: skip


def require_finite(values: np.ndarray, what: str, remedy: str) -> np.ndarray:
    """The values. Raises UserError where one is NaN or infinite: `what` names them, `remedy` says what to do."""
    if not np.isfinite(values).all():
        raise UserError(f"{what}: NaN or infinite; {remedy}")
    return values
