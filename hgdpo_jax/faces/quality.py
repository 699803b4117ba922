"""How good a face is for recognition: eDifFIQA(T) (Babnik et al. 2024), an ONNX file of OpenCV's."""

import numpy as np
from jaxtyping import Float

from hgdpo_jax.faces.alignment import align
from hgdpo_jax.faces.detection import FaceDetector, Images
from hgdpo_jax.faces.onnx_network import AlignedFaceNetwork
from hgdpo_jax.run.errors import UserError


class FaceQuality:
    """The quality of the best face of each picture, aligned by its five points; 0 where none is found.

    Args:
        path: of the ONNX file, which gives one number for a face.

    Raises:
        UserError: as :class:`AlignedFaceNetwork`, and at a call where it gives other than one number.
    """

    def __init__(self, path: str) -> None:
        self._faces, self._network, self._path = FaceDetector(), AlignedFaceNetwork(path, "an eDifFIQA"), path

    def __call__(self, images: Images) -> Float[np.ndarray, "b"]:
        """float32 of images in [-1, 1]."""
        at = self._faces.detect(images)
        found = np.asarray(at.found)
        quality = self._network(align(images, self._faces.points(images, at.boxes)))
        if quality.size != len(found):
            raise UserError(f"face network {self._path}: gives {quality.shape[1:]} for a face; expected one number")
        return np.where(found, quality.reshape(-1), 0.0).astype(np.float32)
