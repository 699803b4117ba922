"""A captions.jsonl: {"file": "path/in/the/folder.jpg", "caption": "…", "split": "train"}, a line for each example."""

import json
from pathlib import Path

from hgdpo_jax.data.readers.example import Example, Examples, as_captions
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import read_lines

NAME = "captions.jsonl"
_SPLITS = ("base", "train", "heldout")


def read(path: Path) -> Examples:
    """A list of captions is an example for each. Raises UserError for a line that is not as described above."""
    for number, line in read_lines(path):
        try:
            entry = json.loads(line)
            name, captions, split = entry["file"], as_captions(entry["caption"]), entry.get("split")
            if not (isinstance(name, str) and captions):
                raise TypeError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f'{path} line {number}: expects {{"file": …, "caption": …, "split": …}}') from error
        if split is not None and split not in _SPLITS:
            raise UserError(f"{path} line {number}: split {split!r} is not one of {', '.join(_SPLITS)}")
        for caption in captions:
            yield Example(name, path.parent / name, caption, split)
