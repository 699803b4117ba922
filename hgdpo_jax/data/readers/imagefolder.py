"""Hugging Face's imagefolder: metadata.jsonl or metadata.csv in the folder of the images, or in one for each split."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hgdpo_jax.data.readers import table
from hgdpo_jax.data.readers.example import CAPTIONS, SPLITS, Example, Examples, caption_of, split_of_folder
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import read_lines

NAMES = ("metadata.jsonl", "metadata.csv")


def lists_in(folder: Path) -> list[Path]:
    """The metadata of a folder and of the folders in it."""
    return sorted(path for name in NAMES for pattern in (name, f"*/{name}") for path in folder.glob(pattern))


def read(folder: Path) -> Examples:
    """Raises UserError for a line without file_name and a caption, or whose file lies elsewhere."""
    for path in lists_in(folder):
        for number, entry in _entries(path):
            file, caption = entry.get("file_name"), caption_of(entry)
            if not isinstance(file, str) or caption is None:
                raise UserError(f"{path} line {number}: expects file_name and one of {', '.join(CAPTIONS)}")
            image = path.parent / file
            if not image.is_relative_to(folder):
                raise UserError(f"{path} line {number}: file_name {file} lies outside of {folder}")
            name = image.relative_to(folder).as_posix()
            split = SPLITS.get(str(entry.get("split", "")).lower())
            yield Example(name, image, caption, split or split_of_folder(name))


def _entries(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if path.suffix == ".csv":
        yield from table.read_rows(path)
        return
    for number, line in read_lines(path):
        try:
            entry = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{path} line {number}: is not JSON ({error})") from error
        if not isinstance(entry, dict):
            raise UserError(f"{path} line {number}: is no JSON object")
        yield number, entry
