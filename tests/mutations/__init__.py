"""Damaged files of every kind that people bring or a run keeps, always alike for the same number.

What reads them must read them, name them in a warning, or refuse them in one line; and change nothing in their folder.
Anything else ends in the exception.
"""

import collections
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from hgdpo_jax.run.errors import UserError, as_line
from tests.mutations.case import Case
from tests.mutations.damage import damaged

Found = collections.Counter[tuple[str, str, str]]


def places(cases: Mapping[str, Case]) -> list[tuple[str, str]]:
    """(case, file) of all that is damaged."""
    return [(name, file) for name, case in cases.items() for file in case.damaged]


def sound(cases: Mapping[str, Case]) -> None:
    """Raises AssertionError for a case whose undamaged files are not all read."""
    for name, case in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            _write(Path(folder), case, case.damaged[0], case.files[case.damaged[0]])
            assert (how := _read(case, Path(folder))) == "read", f"{name}: {how}"


def run(cases: Mapping[str, Case], numbers: Sequence[int], each: Callable[[], object] = lambda: None) -> Found:
    """(case, file, how reading ended) → how often, of the damaged files of some numbers."""
    found: Found = collections.Counter()
    every = places(cases)
    for number in numbers:
        name, file = every[number % len(every)]
        rng = np.random.default_rng(number)
        content = damaged(file, cases[name].files[file], rng)
        with tempfile.TemporaryDirectory() as folder:
            _write(Path(folder), cases[name], file, content)
            before = _listed(Path(folder))
            try:
                how = _read(cases[name], Path(folder))
                assert _listed(Path(folder)) == before, "reading has changed the folder"
            except Exception as error:
                error.add_note(f"number {number}: {name}, {file}: {content[:2000]!r}")
                raise
        found[name, file, how] += 1
        each()
    return found


def _write(folder: Path, case: Case, file: str, content: bytes) -> None:
    for name, sound in {**case.files, file: content}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(sound)
    for name, place in case.linked.items():
        (folder / name).symlink_to(place)


def _listed(folder: Path) -> dict[Path, tuple[bytes, int] | None]:
    """All that is in a folder, with its content and when it was written."""
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns) if path.is_file() else None for path in folder.rglob("*")
    }


def _read(case: Case, folder: Path) -> str:
    """How reading ended."""
    try:
        return "read" if case.read(folder) else "named and left out"
    except UserError as error:
        line = as_line(error)
        assert line and len(line.splitlines()) == 1 and 20 < len(line) < 2000, repr(line)
        assert (str(folder) if case.named is None else case.named) in line, line
        return "refused"
