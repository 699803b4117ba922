"""Photographs → pixels: decoded, scaled to cover a resolution, cut to the centre."""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageOps

from hgdpo_jax.data.photographs import Photograph
from hgdpo_jax.pictures.read import UnreadableImage, read_image
from hgdpo_jax.run.files import Member

_THREADS = 4  # that decode; one photograph may take 100 MB meanwhile


def load_images(
    photographs: Sequence[Photograph], resolution: tuple[int, int]
) -> tuple[list[Photograph], Float[np.ndarray, "n H W 3"]]:
    """Those that can be read, and their pixels in [-1, 1]: scaled to cover height x width, then cut to the centre.

    An unreadable photograph is named in a warning and left out.
    """
    found = _cut_all(photographs, [photograph.picture for photograph in photographs], resolution)
    readable = [photograph for photograph, image in zip(photographs, found, strict=True) if image is not None]
    images = [image for image in found if image is not None]
    return readable, np.stack(images) if images else np.zeros((0, *resolution, 3), np.float32)


def load_losers(
    photographs: Sequence[Photograph], images: Float[np.ndarray, "n H W 3"]
) -> tuple[list[Photograph], Float[np.ndarray, "m H W 3"], Float[np.ndarray, "m H W 3"]]:
    """The given pairs whose losers can be read too, with the pixels of winners and losers, which are cut alike."""
    losers = _cut_all(photographs, [photograph.loser for photograph in photographs], (images.shape[1], images.shape[2]))
    kept = [i for i, loser in enumerate(losers) if loser is not None]
    found = [loser for loser in losers if loser is not None]
    return [photographs[i] for i in kept], images[kept], np.stack(found) if found else images[:0]


def _cut_all(
    photographs: Sequence[Photograph], pictures: Sequence[Path | Member | None], resolution: tuple[int, int]
) -> list[Float[np.ndarray, "H W 3"] | None]:
    """See :func:`_cut`."""
    with ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(_cut, photographs, pictures, repeat(resolution)))


def _cut(
    photograph: Photograph, picture: Path | Member | None, resolution: tuple[int, int]
) -> Float[np.ndarray, "H W 3"] | None:
    """A picture of a photograph's example; None, and a warning, where it cannot be read."""
    height, width = resolution
    assert picture is not None
    try:
        image = ImageOps.fit(read_image(picture), (width, height), Image.Resampling.LANCZOS)
    except UnreadableImage as error:
        logging.warning("photograph %s cannot be read (%s); left out", picture, error)
        return None
    image = ImageOps.mirror(image) if photograph.mirrored else image
    return np.asarray(image, np.float32) / 127.5 - 1.0
