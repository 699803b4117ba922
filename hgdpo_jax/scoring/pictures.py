"""Images as pictures: uint8, side by side, PNG."""

import io

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image


def to_uint8(images: Float[np.ndarray, "*n H W 3"]) -> UInt8[np.ndarray, "*n H W 3"]:
    """Images in [-1, 1] → 0…255."""
    return np.round((images + 1.0) * 127.5).clip(0, 255).astype(np.uint8)


def grid(images: Float[np.ndarray, "n H W 3"], columns: int) -> UInt8[np.ndarray, "H2 W2 3"]:
    """One picture of images in [-1, 1], row by row; missing ones are white."""
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
