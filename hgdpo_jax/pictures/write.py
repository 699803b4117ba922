"""Images as pictures: uint8, side by side, PNG and JPEG."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import atomic_path


def require_finite(values: Float[np.ndarray, "n ..."], names: Sequence[str]) -> None:
    """Raises UserError that names the first of n pictures, or latents, which holds NaN or infinity: it would be black.

    Args:
        values: of all.
        names: of each.
    """
    broken = np.flatnonzero(~np.isfinite(values).all(axis=tuple(range(1, values.ndim))))
    if broken.size:
        raise UserError(f"{names[broken[0]]}: NaN or infinity was drawn ({broken.size} of {len(values)}); with float16 "
                        "take bfloat16, else lower guidance and LoRA weight, or take another checkpoint")  # fmt: skip


def to_uint8(images: Float[np.ndarray, "*n H W 3"]) -> UInt8[np.ndarray, "*n H W 3"]:
    """Images in [-1, 1] → 0…255."""
    return np.round((images + 1.0) * 127.5).clip(0, 255).astype(np.uint8)


def grid(images: Float[np.ndarray, "n H W 3"], columns: int) -> UInt8[np.ndarray, "_ {columns}*W 3"]:
    """One picture of images in [-1, 1], row by row; empty places are white."""
    n, height, width, _ = images.shape
    rows = -(-n // columns)
    padded = np.ones((rows * columns, height, width, 3), np.float32)
    padded[:n] = images
    joined = padded.reshape(rows, columns, height, width, 3).swapaxes(1, 2)
    return to_uint8(joined.reshape(rows * height, columns * width, 3))


def png(image: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """A PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def jpeg(image: UInt8[np.ndarray, "H W 3"], fine: bool = False) -> bytes:
    """A JPEG file of quality 90; a `fine` one of 95 with every pixel's colour, in which an eye sees no loss."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", **({"quality": 95, "subsampling": "4:4:4"} if fine else {"quality": 90}))
    return file.getvalue()


def write_png(path: Path, image: UInt8[np.ndarray, "H W 3"], settings: Mapping[str, Any]) -> None:
    """A PNG file that says how it was made.

    `settings`, among them `prompt`, are written as JSON under `hgdpo_jax`, and in the form that most tools show under
    `parameters`; none are written where they are empty.
    """
    info = PngInfo()
    if settings:
        rest = ", ".join(f"{name.capitalize()}: {value}" for name, value in settings.items() if name != "prompt")
        info.add_itxt("parameters", f"{settings['prompt']}\n{rest}")
        info.add_itxt("hgdpo_jax", json.dumps(settings))
    with atomic_path(path) as temporary:
        Image.fromarray(image).save(temporary, "PNG", pnginfo=info)


def contact_sheet(files: Sequence[Path], columns: int, side: int = 256) -> UInt8[np.ndarray, "H W 3"]:
    """Pictures on disk in rows, each reduced to fit a square of `side` pixels, on white."""
    rows = -(-len(files) // columns)
    pictures = []
    for path in files:
        with Image.open(path) as opened:
            pictures.append(opened.convert("RGB"))
            pictures[-1].thumbnail((side, side), Image.Resampling.LANCZOS)
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    sheet = Image.new("RGB", (width * min(columns, len(files)), height * rows), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return np.asarray(sheet)
