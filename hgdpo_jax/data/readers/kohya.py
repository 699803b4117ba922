"""kohya's JSON of captions: {"path/of/image.jpg": {"caption": "…", "tags": "…"}, …}."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from hgdpo_jax.data.readers.beside import is_passed_over
from hgdpo_jax.data.readers.example import Example, Examples, captions_of, split_of_folder
from hgdpo_jax.data.readers.table import read_json
from hgdpo_jax.pictures.read import SUFFIXES
from hgdpo_jax.run.errors import UserError


def read(path: Path) -> Examples:
    """Paths are relative to the file's folder, or whole, with or without suffix; tags are taken where there is no
    caption. A list of captions is an example for each.

    Raises:
        UserError: not such a file, an entry without caption and tags, or a name without suffix that two images have.
    """
    entries = read_json(path)
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise UserError(f'{path}: expects {{"image.jpg": {{"caption": …}}, …}}')
    images_in = lru_cache(_images_in)
    for name, entry in entries.items():
        tags = entry.get("tags")
        captions = [text for text in captions_of(entry) if text] or ([tags] if isinstance(tags, str) else [])
        if not captions:
            raise UserError(f"{path}: {name} has neither caption nor tags")
        image = _image(path, name, images_in)
        for caption in captions:
            yield Example(name, image, caption, split_of_folder(name))


def _image(path: Path, name: str, images_in: Callable[[Path], dict[str, list[Path]]]) -> Path:
    """The file itself, or that with some suffix of images."""
    named = path.parent / name
    if named.suffix.lower() in SUFFIXES:
        return named
    found = images_in(named.parent).get(named.name, [named])
    if len(found) > 1:
        raise UserError(f"{path}: {name} may be {found[0].name} or {found[1].name}; write its suffix")
    return found[0]


def _images_in(folder: Path) -> dict[str, list[Path]]:
    """Name without suffix → the images of a folder that have it."""
    found: dict[str, list[Path]] = {}
    for image in sorted(folder.iterdir()) if folder.is_dir() else []:
        if image.suffix.lower() in SUFFIXES and not is_passed_over(image.name):
            found.setdefault(image.stem, []).append(image)
    return found
