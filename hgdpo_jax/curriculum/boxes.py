"""Which part of a photograph SDRecon redraws: the box of its face, or of the body below it."""

import math

import numpy as np
from jaxtyping import Bool, Float

from hgdpo_jax.faces.detection import FaceDetector

_WIDTH, _ABOVE = 3, 0.5  # of the body in widths of the face, and what is above that in its heights


class Redrawn:
    """Finds what is redrawn of photographs.

    Args:
        part: `face`, or `body`: from above the face to the lower edge, three faces wide.
    """

    def __init__(self, part: str) -> None:
        self._part, self._detector = part, FaceDetector()

    def __call__(
        self, images: Float[np.ndarray, "n H W 3"], height: int, width: int
    ) -> tuple[Float[np.ndarray, "n h w 1"], Bool[np.ndarray, "n"]]:
        """1 in the cells of a latent that the box touches, 0 elsewhere; and whether there is a face.

        Args:
            images: in [-1, 1].
            height, width: of a latent.
        """
        found = self._detector.detect(images)
        scale = np.array([width / images.shape[2], height / images.shape[1]] * 2)
        masks = np.zeros((len(images), height, width, 1), np.float32)
        for mask, box in zip(masks, np.asarray(found.boxes) * scale, strict=True):
            left, top, right, bottom = box.tolist()
            if self._part == "body":
                wider, higher = (_WIDTH - 1) / 2 * (right - left), _ABOVE * (bottom - top)
                left, top, right, bottom = left - wider, top - higher, right + wider, height
            mask[max(0, math.floor(top)) : math.ceil(bottom), max(0, math.floor(left)) : math.ceil(right)] = 1
        return masks, np.asarray(found.found)
