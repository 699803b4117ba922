"""Sheets of pictures to be looked at: a row for each model, with its name; a column for each prompt or person."""

import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

GAP = 4  # pixels around each picture
_SMALL = 256  # pixels a side, below which a picture is doubled

Rows = Mapping[str, UInt8[np.ndarray, "n h w 3"]]  # name → as many pictures in each row


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
