"""D_real: a folder of photographs with a captions.jsonl that lists them.

One line per photograph: {"file": "path/in/the/folder.jpg", "caption": "…", "split": "train"}; `split` is `train`
(the default: the curriculum learns from it), `heldout` (for evaluation) or `base` (for the base's own training).
"""

import json
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageOps

from hgdpo_jax.errors import UserError
from hgdpo_jax.files import Index, read_lines
from hgdpo_jax.images import UnreadableImage, read_image

SPLITS = ("base", "train", "heldout")


@dataclass(frozen=True)
class Photograph:
    """One line of captions.jsonl. The id is the file's path in its folder; `#2`, … follow where further lines have the
    same file, and `#mirrored` for its mirror image."""

    id: str
    path: Path
    caption: str
    split: str = "train"
    mirrored: bool = False


def list_photographs(folder: str | Path, *splits: str, mirror: bool = False) -> list[Photograph]:
    """The photographs of some splits, in the order of the file; with `mirror` each is followed by its mirror image.

    Every line is an example of its own, several captions of one file too.

    Raises:
        UserError: no captions.jsonl, a line that is not as described above, or none in these splits.
    """
    path = Path(folder) / "captions.jsonl"
    if not str(folder) or not path.is_file():
        raise UserError(f"photographs {path}: no such file; set --config.data.photographs to a folder that has one")
    found, lines = [], Counter()
    for number, line in read_lines(path):
        try:
            entry = json.loads(line)
            name, caption, place = entry["file"], entry["caption"], entry.get("split", "train")
            if not (isinstance(name, str) and isinstance(caption, str)):
                raise TypeError
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f'{path} line {number}: expects {{"file": …, "caption": …, "split": …}}') from error
        if place not in SPLITS:
            raise UserError(f"{path} line {number}: split {place!r} is not one of {', '.join(SPLITS)}")
        lines[name] += 1
        if place in splits:
            example = name if lines[name] == 1 else f"{name}#{lines[name]}"
            found.append(Photograph(example, path.parent / name, caption, place))
            if mirror:
                found.append(Photograph(f"{example}#mirrored", path.parent / name, caption, place, mirrored=True))
    if not found:
        name = " or ".join(splits)
        raise UserError(f'{path}: no photograph of split {name}; mark some lines with "split": "{splits[-1]}"')
    twice = [name for name, count in Counter(p.id for p in found).items() if count > 1]
    if twice:
        raise UserError(f"{path}: {twice[0]} names two examples; rename the file whose name ends in #")
    return found


def by_shape(
    photographs: Sequence[Photograph], resolutions: Mapping[str, tuple[int, int]], index: Index | None = None
) -> dict[str, list[Photograph]]:
    """Name of a resolution → the photographs whose height / width is nearest to its own on a logarithmic scale.

    One that cannot be read goes to the first; :func:`load_images` will name it. An index spares opening those it knows.
    """
    index = index or Index()
    found: dict[str, list[Photograph]] = {name: [] for name in resolutions}
    first = next(iter(found))
    shapes = {name: math.log(height / width) for name, (height, width) in resolutions.items()}
    for photograph in photographs:
        nearest = first
        if len(resolutions) > 1:
            try:
                height, width = index.shape(photograph.path)
            except (OSError, ValueError, UnreadableImage):
                pass
            else:
                shape = math.log(height / width)
                nearest = min(shapes, key=lambda name: abs(shapes[name] - shape))
        found[nearest].append(photograph)
    return found


def load_images(
    photographs: list[Photograph], resolution: tuple[int, int]
) -> tuple[list[Photograph], Float[np.ndarray, "n H W 3"]]:
    """Those that can be read, and their pixels in [-1, 1]: scaled to cover height x width, then cut to the centre.

    An unreadable photograph is named in a warning and left out.
    """
    height, width = resolution
    readable, images = [], []
    for photograph in photographs:
        try:
            image = ImageOps.fit(read_image(photograph.path), (width, height), Image.Resampling.LANCZOS)
        except UnreadableImage as error:
            logging.warning("photograph %s cannot be read (%s); left out", photograph.path, error)
            continue
        if photograph.mirrored:
            image = ImageOps.mirror(image)
        readable.append(photograph)
        images.append(np.asarray(image, np.float32) / 127.5 - 1.0)
    return readable, np.stack(images) if images else np.zeros((0, height, width, 3), np.float32)
