"""Files that belong together, and what reads them."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple


class Case(NamedTuple):
    """Files that a command reads.

    Attributes:
        files: name in a folder → content.
        damaged: names of those that are damaged, one at a time.
        read: reads what lies in the folder as a command does, or calls what the command calls; returns whether all was
            read, and raises UserError where it is refused.
        linked: name in a folder → a file that is there, and never damaged.
        named: what a line that refuses it names; where nothing is said, the folder.
    """

    files: Mapping[str, bytes]
    damaged: Sequence[str]
    read: Callable[[Path], bool]
    linked: Mapping[str, Path] = {}
    named: str | None = None


def written(write: Callable[[Path], object]) -> dict[str, bytes]:
    """The files that are written into an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}
