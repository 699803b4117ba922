"""Images with a text file of the same name beside them, as kohya's scripts and OneTrainer keep them."""

import logging
from pathlib import Path

from hgdpo_jax.data.readers.example import Example, Examples, split_of_folder
from hgdpo_jax.pictures.read import SUFFIXES
from hgdpo_jax.run.files import read_lines

_TEXTS = (".txt", ".caption")


def images_in(folder: Path) -> list[Path]:
    """All image files below a folder, by their paths."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def text_of(image: Path) -> Path | None:
    """The text file beside an image, named like it with or without its suffix."""
    beside = [image.with_suffix(suffix) for suffix in _TEXTS] + [Path(f"{image}{suffix}") for suffix in _TEXTS]
    return next((path for path in beside if path.is_file()), None)


def read(folder: Path) -> Examples:
    """The caption is the first line that is not blank. An image without one is left out, and how many are is said."""
    without = []
    for image in images_in(folder):
        path = text_of(image)
        lines = read_lines(path) if path else []
        if lines:
            name = image.relative_to(folder).as_posix()
            yield Example(name, image, lines[0][1], split_of_folder(name))
        else:
            without.append(image)
    if without:
        logging.warning("%d images without text beside them are left out, the first is %s", len(without), without[0])
