"""Where the face is in an image, and the square that shows it.

Positions are (x, y) in pixels of the image, whose upper left corner is (0, 0): the first pixel's centre is (0.5, 0.5).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from hgdpo_jax.config import ASSETS
from hgdpo_jax.faces.landmarks import SIZE as LANDMARK_SIZE
from hgdpo_jax.faces.landmarks import FaceLandmarks
from hgdpo_jax.faces.networks import TinyFaceDetector
from hgdpo_jax.models.convert import load_model

NETWORKS = ASSETS / "face"
_LARGE_FACES, _SMALL_FACES = 128, 320  # the detector sees an image at both sizes, in pixels a side
_MAGNIFIED = 3  # but at most so many times as large as it is: in small images faces are not that small
_THRESHOLD = 0.3

Images = Float[Array | np.ndarray, "n H W 3"]
Boxes = Float[Array | np.ndarray, "n 4"]


class Detection(NamedTuple):
    """The best face of each image.

    Attributes:
        boxes: (left, top, right, bottom) in pixels; the central square where no face was found.
        found: whether the score is above the threshold.
        scores: the best ones, in [0, 1].
    """

    boxes: Float[Array, "n 4"]
    found: Bool[Array, "n"]
    scores: Float[Array, "n"]


def _sizes(height: int, width: int) -> tuple[int, int]:
    """The sizes at which the detector sees an image: multiples of 32, as its five poolings need."""
    return _LARGE_FACES, max(_LARGE_FACES + 32, min(_SMALL_FACES, _MAGNIFIED * max(height, width) // 32 * 32))


def best_face(detector: TinyFaceDetector, images: Images) -> Detection:
    """The box of the highest score. One box an image: there is nothing to suppress."""
    candidates = [detector(jnp.asarray(images), size) for size in _sizes(*images.shape[1:3])]
    boxes, scores = (jnp.concatenate(parts, axis=1) for parts in zip(*candidates, strict=True))
    best = jnp.take_along_axis(boxes, scores.argmax(1)[:, None, None], axis=1)[:, 0]
    found = scores.max(1) > _THRESHOLD
    height, width = images.shape[1:3]
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    square = jnp.asarray([left, top, left + side, top + side])
    return Detection(jnp.where(found[:, None], best, square), found, scores.max(1))


def square_of(boxes: Boxes, height: int, width: int) -> tuple[Float[Array, "n 2"], Float[Array, "n 1"]]:
    """The upper left corner and the side of the square that :func:`crop` cuts out."""
    first, last = boxes[:, :2], boxes[:, 2:]
    side = jnp.minimum((last - first).max(-1, keepdims=True), min(height, width))
    return jnp.clip(0.5 * (first + last) - 0.5 * side, 0.0, jnp.asarray([width, height]) - side), side


@partial(jax.jit, static_argnames="size")
def crop(images: Images, boxes: Boxes, size: int) -> Float[Array, "n size size 3"]:
    """The square on the longer side of each box, about its centre, scaled bilinearly to size x size.

    The detector's boxes reach a little beyond chin, ears and brows: no other margin separated people better. A square
    that would reach beyond the image is moved inside, and made smaller if it has to be, so that no edge looks like a
    feature of the face.
    """
    corner, side = square_of(boxes, *images.shape[1:3])

    def cut(image: Float[Array, "H W 3"], corner: Float[Array, "2"], side: Float[Array, "1"]) -> Float[Array, "s s 3"]:
        scale = jnp.tile(size / side, 2)
        return jax.image.scale_and_translate(image, (size, size, 3), (0, 1), scale, -corner[::-1] * scale, "linear")

    return jax.vmap(cut)(jnp.asarray(images), corner, side)


def five_points(landmarks: FaceLandmarks, images: Images, boxes: Boxes) -> Float[Array, "n 5 2"]:
    """The eyes' centres, nose tip, mouth's corners, from the square that :func:`crop` makes of each box.

    Left comes before right, as the image shows them. Without a face the points mean nothing. face-api blackens the part
    of the square that lies outside the box; on the embedded photographs the points are as steady without.
    """
    corner, side = square_of(boxes, *images.shape[1:3])
    every = corner[:, None] + side[:, None] * landmarks(crop(images, boxes, LANDMARK_SIZE))
    eyes = [every[:, 36:42].mean(1), every[:, 42:48].mean(1)]
    return jnp.stack([*eyes, every[:, 30], every[:, 48], every[:, 54]], axis=1)


class FaceDetector:
    """The compiled detector of faces and their points. Among several faces in an image the clearest counts.

    Raises:
        UserError: a network is missing or damaged.
    """

    def __init__(self) -> None:
        detector, self._detector = nnx.split(load_model(TinyFaceDetector, NETWORKS / "detector"))
        landmarks, self._landmarks = nnx.split(load_model(FaceLandmarks, NETWORKS / "landmarks"))
        self._detect = jax.jit(lambda weights, images: best_face(nnx.merge(detector, weights), images))
        self._points = jax.jit(lambda weights, *where: five_points(nnx.merge(landmarks, weights), *where))

    def detect(self, images: Images) -> Detection:
        """The best face of each image in [-1, 1]. Compiled anew for each shape of `images`."""
        return self._detect(self._detector, images)

    def points(self, images: Images, boxes: Boxes) -> Float[Array, "n 5 2"]:
        """See :func:`five_points`; the first two are the eyes."""
        return self._points(self._landmarks, images, boxes)
