"""Hugging Face's imagefolder: metadata.jsonl or metadata.csv in the folder of the images, or in one for each split."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hgdpo_jax.data.readers import table
from hgdpo_jax.data.readers.beside import is_passed_over
from hgdpo_jax.data.readers.example import CAPTIONS, SPLITS, Example, Examples, captions_of, split_of_folder
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import read_lines

NAMES = ("metadata.jsonl", "metadata.csv")


def lists_in(folder: Path) -> list[Path]:
    """The metadata of a folder and of the folders in it."""
    found = (path for name in NAMES for pattern in (name, f"*/{name}") for path in folder.glob(pattern))
    return sorted(path for path in found if not is_passed_over(path.relative_to(folder).as_posix()))


def read(folder: Path) -> Examples:
    """A list of captions is an example for each.

    Raises:
        UserError: a line without file_name and a caption, or whose file lies elsewhere or is in another list too.
    """
    listed: dict[str, Path] = {}
    for path in lists_in(folder):
        for number, entry in _entries(path):
            file, captions = entry.get("file_name"), captions_of(entry)
            if not (isinstance(file, str) and file and captions):
                raise UserError(f"{path} line {number}: expects file_name and one of {', '.join(CAPTIONS)}")
            name = os.path.relpath(path.parent / file, folder)
            if name.partition("/")[0] == "..":
                raise UserError(f"{path} line {number}: file_name {file} lies outside of {folder}")
            if listed.setdefault(name, path) != path:
                raise UserError(f"{path} line {number}: {listed[name]} lists {name} too; keep one of the two lists")
            split = SPLITS.get(str(entry.get("split", "")).lower()) or split_of_folder(name)
            for caption in captions:
                yield Example(name, folder / name, caption, split)


def _entries(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if path.suffix == ".csv":  # which has no other way to say that there is none
        yield from (
            (number, {key: value or None for key, value in row.items()}) for number, row in table.read_rows(path)
        )
        return
    for number, line in read_lines(path):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} line {number}: is not JSON ({error})") from error
        if not isinstance(entry, dict):
            raise UserError(f"{path} line {number}: is no JSON object")
        yield number, entry
