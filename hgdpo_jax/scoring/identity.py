"""Whose face an image shows: the face is found, cut out and embedded; nearer embeddings are more alike.

Positions are (x, y) in pixels of the image, whose upper left corner is (0, 0): the first pixel's centre is (0.5, 0.5).
"""

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
from hgdpo_jax.models.face_attributes import SIZE as LANDMARK_SIZE
from hgdpo_jax.models.face_attributes import FaceLandmarks

_NETWORKS = ASSETS / "face"
_FILLING, _SMALL = 128, 320  # pixels a side, at which the detector sees an image: for faces that fill it, small ones
_MAGNIFIED = 3  # but never more times as large: in small pictures faces are not that small
_THRESHOLD = 0.3
# Where networks trained with insightface expect the five points in a crop of 112x112 pixels, whose centres they count
# in whole numbers, as OpenCV does.
ALIGNED_SIZE = 112
_TEMPLATE = ((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041))

Images = Float[Array, "n H W 3"]
Embeddings = Float[np.ndarray, "n d"]


class Found(NamedTuple):
    """(left, top, right, bottom) in pixels of the best face of each image, or of its central square if it has none; and
    the best score, in [0, 1]."""

    boxes: Float[Array, "n 4"]
    found: Bool[Array, "n"]
    scores: Float[Array, "n"]


class Embedded(NamedTuple):
    """Embeddings, and in which images a face was found; those of the others are of their central square. The detector's
    best scores, in [0, 1]."""

    embedding: Embeddings
    found: Bool[np.ndarray, "n"]
    scores: Float[np.ndarray, "n"]


def _sizes(height: int, width: int) -> tuple[int, int]:
    """At which the detector sees an image of this size: multiples of 32, as its five poolings need."""
    return _FILLING, max(_FILLING + 32, min(_SMALL, _MAGNIFIED * max(height, width) // 32 * 32))


def best_face(detector: TinyFaceDetector, images: Images) -> Found:
    """The box of the highest score, if that is above the threshold. One box a picture: there is nothing to suppress."""
    looks = [detector(images, size) for size in _sizes(*images.shape[1:3])]
    boxes, scores = (jnp.concatenate(seen, axis=1) for seen in zip(*looks, strict=True))
    best = jnp.take_along_axis(boxes, scores.argmax(1)[:, None, None], axis=1)[:, 0]
    found = scores.max(1) > _THRESHOLD
    height, width = images.shape[1:3]
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    return Found(
        jnp.where(found[:, None], best, jnp.asarray([left, top, left + side, top + side])), found, scores.max(1)
    )


def _square(boxes: Float[Array, "n 4"], height: int, width: int) -> tuple[Float[Array, "n 2"], Float[Array, "n 1"]]:
    """The upper left corner and the side of the square that :func:`crop` cuts out."""
    first, last = boxes[:, :2], boxes[:, 2:]
    side = jnp.minimum((last - first).max(-1, keepdims=True), min(height, width))
    return jnp.clip(0.5 * (first + last) - 0.5 * side, 0.0, jnp.asarray([width, height]) - side), side


@partial(jax.jit, static_argnames="size")
def crop(images: Images, boxes: Float[Array, "n 4"], size: int) -> Float[Array, "n size size 3"]:
    """The square on the longer side of each box, about its centre, scaled bilinearly to size x size.

    The detector's boxes reach a little beyond chin, ears and brows: no other margin separated people better. A square
    that would reach beyond the image is moved inside, and made smaller if it has to be, so that no edge looks like a
    feature of the face.
    """
    corner, side = _square(boxes, *images.shape[1:3])

    def cut(image: Float[Array, "H W 3"], corner: Float[Array, "2"], side: Float[Array, "1"]) -> Float[Array, "s s 3"]:
        scale = jnp.tile(size / side, 2)
        return jax.image.scale_and_translate(image, (size, size, 3), (0, 1), scale, -corner[::-1] * scale, "linear")

    return jax.vmap(cut)(images, corner, side)


def five_points(landmarks: FaceLandmarks, images: Images, boxes: Float[Array, "n 4"]) -> Float[Array, "n 5 2"]:
    """The eyes' centres, nose tip, mouth's corners, from the square that :func:`crop` makes of each box.

    Left comes before right, as the image shows them. Where there is no face they mean nothing.
    face-api blackens what this square shows beyond the box; on the embedded photographs, turned and scaled, the points
    are as steady either way.
    """
    corner, side = _square(boxes, *images.shape[1:3])
    every = corner[:, None] + side[:, None] * landmarks(crop(images, boxes, LANDMARK_SIZE))
    eyes = [every[:, 36:42].mean(1), every[:, 42:48].mean(1)]
    return jnp.stack([*eyes, every[:, 30], every[:, 48], every[:, 54]], axis=1)


def similarity(sources: Float[Array, "n k 2"], targets: Float[Array, "k 2"]) -> Float[Array, "n 2 3"]:
    """[A | t] with A x + t nearest to the targets in squares, where A turns and scales alike in all directions.

    Umeyama (1991), who needs no singular values in the plane: as complex numbers, with both means taken off, A is the
    sum of conj(source) * target over that of |source|^2. Sources that are all the same point give NaN.
    """
    centre, goal = sources.mean(1), targets.mean(0)
    x, y = jnp.moveaxis(sources - centre[:, None], -1, 0)
    u, v = (targets - goal).T
    real, imaginary = jnp.stack([x * u + y * v, x * v - y * u]).sum(-1) / (x * x + y * y).sum(-1)
    turn = jnp.stack([real, -imaginary, imaginary, real], axis=-1).reshape(-1, 2, 2)
    shift = goal - jnp.einsum("nij,nj->ni", turn, centre, precision="highest")
    return jnp.concatenate([turn, shift[..., None]], axis=-1)


@jax.jit
def align(images: Images, points: Float[Array, "n 5 2"]) -> Float[Array, "n 112 112 3"]:
    """The image turned, scaled and moved so that the five points come nearest to insightface's; bilinear.

    Beyond the image it is black, as where these networks were trained.
    """
    turn, shift = jnp.split(similarity(points, jnp.asarray(_TEMPLATE) + 0.5), [2], axis=-1)
    back = turn.mT / jnp.square(turn[:, :1]).sum(-1, keepdims=True)  # the inverse: transposed, over the scale squared
    place = jnp.arange(ALIGNED_SIZE) + 0.5
    places = jnp.stack(jnp.meshgrid(place, place)).reshape(2, -1)

    def cut(
        image: Float[Array, "H W 3"], back: Float[Array, "2 2"], shift: Float[Array, "2 1"]
    ) -> Float[Array, "s s 3"]:
        x, y = jnp.matmul(back, places - shift, precision="highest") - 0.5
        one = partial(jax.scipy.ndimage.map_coordinates, coordinates=[y, x], order=1, mode="constant", cval=-1.0)
        return jax.vmap(one, in_axes=-1, out_axes=-1)(image).reshape(ALIGNED_SIZE, ALIGNED_SIZE, 3)

    return jax.vmap(cut)(images, back, shift)


class Faces:
    """The compiled detector of faces and their points. One face an image is expected; of several the clearest counts.

    Raises:
        UserError: a network is missing or damaged.
    """

    def __init__(self) -> None:
        networks = (
            load_model(TinyFaceDetector, _NETWORKS / "detector"),
            load_model(FaceLandmarks, _NETWORKS / "landmarks"),
        )
        (detector, self._detector), (landmarks, self._landmarks) = map(nnx.split, networks)

        @jax.jit
        def find(weights: nnx.State, images: Images) -> Found:
            return best_face(nnx.merge(detector, weights), images)

        @jax.jit
        def points(weights: nnx.State, images: Images, boxes: Float[Array, "n 4"]) -> Float[Array, "n 5 2"]:
            return five_points(nnx.merge(landmarks, weights), images, boxes)

        self._find, self._points = find, points

    def find(self, images: Images) -> Found:
        """The best face of each image in [-1, 1]. Compiled anew for each shape of `images`."""
        return self._find(self._detector, images)

    def points(self, images: Images, boxes: Float[Array, "n 4"]) -> Float[Array, "n 5 2"]:
        """See :func:`five_points`; the first two are the eyes."""
        return self._points(self._landmarks, images, boxes)


class _Dlib:
    """The embedded network. Its distance is dlib's: Euclidean, the same person's below 0.6."""

    size = 150

    def __init__(self) -> None:
        graph, self._weights = nnx.split(load_model(FaceRecognition, _NETWORKS / "recognition"))
        self._embed = jax.jit(lambda weights, faces: nnx.merge(graph, weights)(faces))

    def cut(self, faces: Faces, images: Images, at: Found) -> Float[Array, "n s s 3"]:
        return crop(images, at.boxes, self.size)

    def embed(self, faces: Float[Array, "n s s 3"]) -> Embeddings:
        return np.asarray(self._embed(self._weights, faces))

    def distance(self, a: Embeddings, b: Embeddings) -> Float[np.ndarray, "n"]:
        return np.linalg.norm(a - b, axis=-1)


class _ArcFace:
    """A network of the user's, as Deng et al. (2019) train them: RGB in [-1, 1]. Its distance is 1 − cosine, 0…2.

    Its faces are aligned by their five points; of an image without one it sees the central square.
    """

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
        if len(inputs) > 1 or shape != [3, ALIGNED_SIZE, ALIGNED_SIZE] or (isinstance(count, int) and count != 1):
            shapes = " and ".join(f"{entry.name} {entry.shape}" for entry in inputs)
            raise UserError(
                f"face network {path}: its input is {shapes}; give an ArcFace network, whose input is "
                f"[n, 3, {ALIGNED_SIZE}, {ALIGNED_SIZE}]"
            )
        self._input = inputs[0].name

    def cut(self, faces: Faces, images: Images, at: Found) -> Float[Array, "n 112 112 3"]:
        aligned = align(images, faces.points(images, at.boxes))
        return jnp.where(at.found[:, None, None, None], aligned, crop(images, at.boxes, ALIGNED_SIZE))

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
        at = self._faces.find(images)
        embedding = self._network.embed(self._network.cut(self._faces, images, at))
        return Embedded(embedding, np.asarray(at.found), np.asarray(at.scores))

    def distance(self, a: Embeddings, b: Embeddings) -> Float[np.ndarray, "n"]:
        """How far apart embeddings are, pair by pair: Euclidean (dlib's), or 1 − cosine for ArcFace; 0 is the same."""
        return self._network.distance(a, b)
