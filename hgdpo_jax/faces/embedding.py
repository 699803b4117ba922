"""Whose face an image shows: the face is found, cut out and embedded; nearer embeddings are more alike."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from hgdpo_jax.faces.alignment import ALIGNED_SIZE, align
from hgdpo_jax.faces.detection import NETWORKS, Detection, FaceDetector, Images, crop
from hgdpo_jax.faces.networks import FaceRecognition
from hgdpo_jax.faces.onnx_network import AlignedFaceNetwork
from hgdpo_jax.models.convert import load_model

Embeddings = Float[np.ndarray, "n d"]


class Embedded(NamedTuple):
    """Embeddings, each of the face or, where none was found, of the central square; the detector's best scores are in
    [0, 1]."""

    embedding: Embeddings
    found: Bool[np.ndarray, "n"]
    scores: Float[np.ndarray, "n"]


class _Dlib:
    """The embedded network. Its distance is Euclidean as dlib's; two embeddings of one person are closer than 0.6."""

    size = 150

    def __init__(self) -> None:
        graph, self._weights = nnx.split(load_model(FaceRecognition, NETWORKS / "recognition"))
        self._embed = jax.jit(lambda weights, faces: nnx.merge(graph, weights)(faces))

    def cut(self, faces: FaceDetector, images: Images, at: Detection) -> Float[Array, "n s s 3"]:
        return crop(images, at.boxes, self.size)

    def embed(self, faces: Float[Array, "n s s 3"]) -> Embeddings:
        return np.asarray(self._embed(self._weights, faces))

    def distance(self, a: Embeddings, b: Embeddings) -> Float[np.ndarray, "n"]:
        return np.linalg.norm(a - b, axis=-1)


class _ArcFace:
    """An ArcFace network (Deng et al. 2019) of the user's: RGB in [-1, 1]. Its distance is 1 − cosine, 0…2.

    It sees faces aligned by their five points, and the central square of an image without a face.
    """

    size = ALIGNED_SIZE

    def __init__(self, path: str) -> None:
        self._network = AlignedFaceNetwork(path, "an ArcFace")

    def cut(self, faces: FaceDetector, images: Images, at: Detection) -> Float[Array, "n 112 112 3"]:
        aligned = align(images, faces.points(images, at.boxes))
        return jnp.where(at.found[:, None, None, None], aligned, crop(images, at.boxes, ALIGNED_SIZE))

    def embed(self, faces: Float[Array, "n s s 3"]) -> Embeddings:
        return self._network(faces)

    def distance(self, a: Embeddings, b: Embeddings) -> Float[np.ndarray, "n"]:
        return 1.0 - (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


class FaceEmbedder:
    """Embeds faces, by the embedded network or by an ArcFace ONNX file.

    Args:
        path: of the ONNX file, input [n, 3, 112, 112]; empty for the embedded network.

    Raises:
        UserError: no such file, not ONNX, or a network with another input.
    """

    def __init__(self, path: str = "") -> None:
        self._faces = FaceDetector()
        self._network: _ArcFace | _Dlib = _ArcFace(path) if path else _Dlib()

    def embed(self, images: Images) -> Embedded:
        """Embeddings of the best face of each image in [-1, 1]. Compiled anew for each shape of `images`."""
        at = self._faces.detect(images)
        embedding = self._network.embed(self._network.cut(self._faces, images, at))
        return Embedded(embedding, np.asarray(at.found), np.asarray(at.scores))

    def width(self) -> int:
        """The width d of an embedding."""
        return self._network.embed(jnp.zeros((1, self._network.size, self._network.size, 3))).shape[-1]

    def distance(self, a: Embeddings, b: Embeddings) -> Float[np.ndarray, "n"]:
        """The distance of embeddings, pair by pair: Euclidean (dlib's), or 1 − cosine for ArcFace; 0 is the same."""
        return self._network.distance(a, b)
