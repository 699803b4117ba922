"""kohya's JSON of captions: {"path/of/image.jpg": {"caption": "…", "tags": "…"}, …}."""

import json
from pathlib import Path

from hgdpo_jax.data.readers.example import Example, Examples, caption_of, split_of_folder
from hgdpo_jax.pictures.read import SUFFIXES
from hgdpo_jax.run.errors import UserError


def read(path: Path) -> Examples:
    """Paths are relative to the file's folder, or whole, with or without suffix; tags are taken where there is no
    caption.

    Raises:
        UserError: not such a file, or an entry without caption and tags.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({error})") from error
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise UserError(f'{path}: expects {{"image.jpg": {{"caption": …}}, …}}')
    for name, entry in entries.items():
        caption = caption_of(entry) or entry.get("tags")
        if not isinstance(caption, str):
            raise UserError(f"{path}: {name} has neither caption nor tags")
        yield Example(name, _image(path.parent / name), caption, split_of_folder(name))


def _image(named: Path) -> Path:
    """The file itself, or that with some suffix of images."""
    if named.suffix.lower() in SUFFIXES:
        return named
    found = [path for path in sorted(named.parent.glob(f"{named.name}.*")) if path.suffix.lower() in SUFFIXES]
    return found[0] if found else named
