"""Whose face an image shows: the face is found, cut out and embedded; nearer embeddings are more alike."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
from flax import nnx
from jaxtyping import Array, Bool, Float

from hgdpo_jax.config import ASSETS
from hgdpo_jax.errors import UserError
from hgdpo_jax.models.convert import load_model
from hgdpo_jax.models.face import FaceRecognition, TinyFaceDetector

_NETWORKS = ASSETS / "face"
_SIZES = (128, 320)  # at which the detector sees an image: faces that fill it, and small ones
_THRESHOLD = 0.3

Images = Float[Array, "n H W 3"]
Embeddings = Float[np.ndarray, "n d"]


class Found(NamedTuple):
    """(left, top, right, bottom) in pixels of the best face of each image, or of its central square if it has none."""

    boxes: Float[Array, "n 4"]
    found: Bool[Array, "n"]


class Embedded(NamedTuple):
    """Embeddings, and in which images a face was found; those of the others are of their central square."""

    embedding: Embeddings
    found: Bool[np.ndarray, "n"]


def best_face(detector: TinyFaceDetector, images: Images) -> Found:
    """The box of the highest score, if that is above the threshold. One box a picture: there is nothing to suppress."""
    boxes, scores = (jnp.concatenate(seen, axis=1) for seen in zip(*(detector(images, s) for s in _SIZES), strict=True))
    best = jnp.take_along_axis(boxes, scores.argmax(1)[:, None, None], axis=1)[:, 0]
    found = scores.max(1) > _THRESHOLD
    height, width = images.shape[1:3]
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    return Found(jnp.where(found[:, None], best, jnp.asarray([left, top, left + side, top + side])), found)


@partial(jax.jit, static_argnames="size")
def crop(images: Images, boxes: Float[Array, "n 4"], size: int, rise: float = 0.0) -> Float[Array, "n size size 3"]:
    """The square on the longer side of each box, `rise` sides above its centre, scaled bilinearly to size x size.

    The detector's boxes reach a little beyond chin, ears and brows: no other margin separated people better. A square
    that would reach beyond the image is moved inside, and made smaller if it has to be, so that no edge looks like a
    feature of the face.
    """
    height, width = images.shape[1:3]
    first, last = boxes[:, :2], boxes[:, 2:]
    side = jnp.minimum((last - first).max(-1, keepdims=True), min(height, width))
    centre = 0.5 * (first + last) - rise * side * jnp.asarray([0.0, 1.0])
    corner = jnp.clip(centre - 0.5 * side, 0.0, jnp.asarray([width, height]) - side)

    def cut(image: Float[Array, "H W 3"], corner: Float[Array, "2"], side: Float[Array, "1"]) -> Float[Array, "s s 3"]:
        scale = jnp.tile(size / side, 2)
        return jax.image.scale_and_translate(image, (size, size, 3), (0, 1), scale, -corner[::-1] * scale, "linear")

    return jax.vmap(cut)(images, corner, side)


class Faces:
    """The compiled detector of faces. One face an image is expected; of several the clearest counts.

    Raises:
        UserError: no such folder, or weights that do not fit its config.json.
    """

    def __init__(self, folder: str | Path = _NETWORKS / "detector") -> None:
        graph, self._weights = nnx.split(load_model(TinyFaceDetector, folder))
        self._find = jax.jit(lambda weights, images: best_face(nnx.merge(graph, weights), images))

    def find(self, images: Images) -> Found:
        """The best face of each image in [-1, 1]."""
        return self._find(self._weights, images)


class _Dlib:
    """The embedded network. Its distance is dlib's: Euclidean, the same person's below 0.6."""

    size, rise = 150, 0.0

    def __init__(self) -> None:
        graph, self._weights = nnx.split(load_model(FaceRecognition, _NETWORKS / "recognition"))
        self._embed = jax.jit(lambda weights, faces: nnx.merge(graph, weights)(faces))

    def embed(self, faces: Float[Array, "n s s 3"]) -> Embeddings:
        return np.asarray(self._embed(self._weights, faces))

    def distance(self, a: Embeddings, b: Embeddings) -> Float[np.ndarray, "n"]:
        return np.linalg.norm(a - b, axis=-1)


class _ArcFace:
    """A network of the user's, as Deng et al. (2019) train them: RGB in [-1, 1]. Its distance is 1 − cosine, 0…2.

    Their crops are aligned by five points of the face. Those of a level face lie as in a square that is as large as the
    detector's box and a fifth of its side higher; a face that is turned or tilted is not turned back.
    """

    size, rise = 112, 0.2

    def __init__(self, path: str) -> None:
        if not Path(path).is_file():
            raise UserError(f"face network {path}: no such file; give an ArcFace ONNX file, or none for the embedded")
        try:
            self._session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors have no class in common
            reason = " ".join(str(error).split())
            raise UserError(f"face network {path}: not an ONNX file that can be read ({reason})") from error
        inputs = self._session.get_inputs()
        count, *shape = inputs[0].shape
        if len(inputs) > 1 or shape != [3, self.size, self.size] or (isinstance(count, int) and count != 1):
            shapes = " and ".join(f"{entry.name} {entry.shape}" for entry in inputs)
            raise UserError(
                f"face network {path}: its input is {shapes}; give an ArcFace network, whose input is "
                f"[n, 3, {self.size}, {self.size}]"
            )
        self._input = inputs[0].name

    def embed(self, faces: Float[Array, "n s s 3"]) -> Embeddings:
        # One by one: many exported files have a batch of one.
        pixels = np.asarray(faces, np.float32).transpose(0, 3, 1, 2)
        return np.concatenate([self._session.run(None, {self._input: face[None]})[0] for face in pixels])

    def distance(self, a: Embeddings, b: Embeddings) -> Float[np.ndarray, "n"]:
        return 1.0 - (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


class Identity:
    """Embeds faces, by the embedded network or by an ArcFace ONNX file.

    Args:
        path: of the ONNX file, input [n, 3, 112, 112]; empty for the embedded network.

    Raises:
        UserError: no such file, not ONNX, or a network with another input.
    """

    def __init__(self, path: str = "") -> None:
        self._faces = Faces()
        self._network = _ArcFace(path) if path else _Dlib()

    def embed(self, images: Images) -> Embedded:
        """Embeddings of the best face of each image in [-1, 1]. Compiled anew for each shape of `images`."""
        boxes, found = self._faces.find(images)
        faces = crop(images, boxes, self._network.size, self._network.rise)
        return Embedded(self._network.embed(faces), np.asarray(found))

    def distance(self, a: Embeddings, b: Embeddings) -> Float[np.ndarray, "n"]:
        """How far apart embeddings are, pair by pair: Euclidean (dlib's), or 1 − cosine for ArcFace; 0 is the same."""
        return self._network.distance(a, b)
