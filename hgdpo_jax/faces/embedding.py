"""Whose face an image shows: the face is found, cut out and embedded; nearer embeddings are more alike."""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from hgdpo_jax.faces.alignment import ALIGNED_SIZE, align
from hgdpo_jax.faces.detection import NETWORKS, Detection, FaceDetector, Images, crop
from hgdpo_jax.faces.networks import FaceRecognition
from hgdpo_jax.models.convert import load_model
from hgdpo_jax.run.errors import UserError

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
        if not Path(path).is_file():
            raise UserError(f"face network {path}: no such file; give an ArcFace ONNX file, or none for the embedded")
        import onnxruntime  # only who brings a network of that kind needs it

        try:
            # Without a second try on the same processor, of which it would print five lines.
            self._session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"], enable_fallback=0)
        except Exception as error:  # onnxruntime's errors have no class in common
            reason = " ".join(str(error).split())
            raise UserError(f"face network {path}: not an ONNX file that can be read ({reason})") from error
        inputs = self._session.get_inputs()
        count, *shape = inputs[0].shape
        if len(inputs) > 1 or shape != [3, ALIGNED_SIZE, ALIGNED_SIZE] or (isinstance(count, int) and count != 1):
            shapes = " and ".join(f"{entry.name} {entry.shape}" for entry in inputs)
            raise UserError(
                f"face network {path}: its input is {shapes}; give an ArcFace network, whose input is "
                f"[n, 3, {ALIGNED_SIZE}, {ALIGNED_SIZE}]"
            )
        self._input = inputs[0].name

    def cut(self, faces: FaceDetector, images: Images, at: Detection) -> Float[Array, "n 112 112 3"]:
        aligned = align(images, faces.points(images, at.boxes))
        return jnp.where(at.found[:, None, None, None], aligned, crop(images, at.boxes, ALIGNED_SIZE))

    def embed(self, faces: Float[Array, "n s s 3"]) -> Embeddings:
        # One by one: many files are exported with a batch of one.
        pixels = np.asarray(faces, np.float32).transpose(0, 3, 1, 2)
        return np.concatenate([self._session.run(None, {self._input: face[None]})[0] for face in pixels])

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
