"""Pictures of an evaluated run that are made to be looked at: W/portrait.png and W/persons.png.

A row for each model, with its name; a column for each prompt or person.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from hgdpo_jax.pictures.write import to_uint8, write_png
from hgdpo_jax.scoring.personalised import KEPT, PeoplePictures

PORTRAIT, PERSONS = "portrait.png", "persons.png"
COLUMNS = 12  # of the portrait
GAP = 4  # pixels around each picture
_SMALL = 256  # pixels a side, below which a picture is doubled

Rows = Mapping[str, UInt8[np.ndarray, "n h w 3"]]  # name → as many pictures in each row


def write(workdir: Path, pictures: Rows, captions: Sequence[str]) -> None:
    """Writes portrait.png: what each model drew for twelve of these captions, different ones if there are as many."""
    chosen = [i for i, caption in enumerate(captions) if caption not in captions[:i]]
    if len(chosen) < COLUMNS:
        chosen = [*range(len(captions))]
    shown = {name: images[chosen[:COLUMNS]] for name, images in pictures.items()}
    write_png(workdir / PORTRAIT, sheet(shown), {})


def write_people(
    workdir: Path, models: Mapping[str, PeoplePictures], photographs: Float[np.ndarray, "n H W 3"], prompts: int
) -> None:
    """Writes persons.png: the first people's photographs in [-1, 1], and what each model drew of them for the first of
    so many prompts. Without models it removes that of an earlier evaluation."""
    if not models:
        (workdir / PERSONS).unlink(missing_ok=True)
        return
    drawn = {name: found.pictures[::prompts] for name, found in models.items()}
    count = min(KEPT, len(photographs), *map(len, drawn.values()))
    shown = {name: to_uint8(images[:count]) for name, images in {"photograph": photographs, **drawn}.items()}
    write_png(workdir / PERSONS, sheet(shown), {})


def sheet(rows: Rows) -> UInt8[np.ndarray, "H W 3"]:
    """Labelled rows of pictures on white. Small pictures are doubled, without smoothing."""
    count, *shape, _ = next(iter(rows.values())).shape
    scale = 2 if max(shape) < _SMALL else 1
    height, width = (scale * side for side in shape)
    font = ImageFont.load_default(size=max(12, height // 10))
    labels = [name.replace(" + ", "\n+ ") for name in rows]
    measured = ImageDraw.Draw(Image.new("L", (1, 1)))
    left = 2 * GAP + max(math.ceil(measured.textbbox((0, 0), label, font)[2]) for label in labels)
    canvas = Image.new("RGB", (left + count * (width + GAP), GAP + len(rows) * (height + GAP)), "white")
    for row, (label, pictures) in enumerate(zip(labels, rows.values(), strict=True)):
        top = GAP + row * (height + GAP)
        ImageDraw.Draw(canvas).text((GAP, top + height // 2), label, "black", font, anchor="lm")
        for column, picture in enumerate(pictures):
            enlarged = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(enlarged, (left + column * (width + GAP), top))
    return np.asarray(canvas)
