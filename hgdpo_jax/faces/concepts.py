"""Concept images: a photograph of a person → the features that an IP-Adapter reads."""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from hgdpo_jax.faces.detection import FaceDetector, Images, crop
from hgdpo_jax.faces.embedding import FaceEmbedder
from hgdpo_jax.models import ip_adapter
from hgdpo_jax.models.convert import folder_hash
from hgdpo_jax.models.preprocessing import clip_pixels, read_preprocessing
from hgdpo_jax.run import processes
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.index import Index


class Concept(NamedTuple):
    """Features of each image's face or, where none was found, of its central square."""

    features: Float[np.ndarray, "n m f"]
    found: Bool[np.ndarray, "n"]


class ConceptEncoder:
    """Images in [-1, 1] → :class:`Concept`.

    The face is cut out. `face_id` reads its identity embedding, of length one; the other kinds read what CLIP's vision
    tower gives.

    Args:
        kind: of the adapter, see `ip_adapter.KINDS`.
        image_encoder: folder of a CLIPVisionModelWithProjection or CLIPModel; not used by `face_id`.
        identity: ArcFace ONNX file for `face_id`; the embedded network unless given.

    Attributes:
        nothing: the features of no image, [1 m f].

    Raises:
        UserError: a network is missing or is not what it should be.
    """

    def __init__(self, kind: str, image_encoder: str, identity: str = "") -> None:
        self._identity = FaceEmbedder(identity) if kind == "face_id" else None
        if self._identity is not None:
            self.nothing = np.zeros((1, 1, self._identity.width()), np.float32)
            return
        _require_encoder(kind, image_encoder)
        encoder = ip_adapter.load_image_encoder(image_encoder)
        size = encoder.config["image_size"]
        how = read_preprocessing(Path(image_encoder), size)
        self._faces, self._size = FaceDetector(), how.short or size
        graph, self._weights = nnx.split(encoder)

        @jax.jit
        def features(weights: nnx.State, faces: Float[Array, "n s s 3"]) -> Float[Array, "n m f"]:
            return ip_adapter.image_features(nnx.merge(graph, weights), kind, clip_pixels(faces, size, how))

        self._features = features
        one = jnp.zeros((1, self._size, self._size, 3))
        self.nothing = np.asarray(ip_adapter.empty(kind, features(self._weights, one), encoder))

    def __call__(self, images: Images) -> Concept:
        """Features of each image."""
        if self._identity is not None:
            embedding, found, _ = self._identity.embed(images)
            return Concept((embedding / np.linalg.norm(embedding, axis=-1, keepdims=True))[:, None], found)
        at = self._faces.detect(images)
        faces = crop(images, at.boxes, self._size)
        return Concept(np.asarray(self._features(self._weights, faces)), np.asarray(at.found))


def encoder_of(config: ConfigDict) -> ConceptEncoder:
    """The encoder that the config's `adapter` group describes."""
    return ConceptEncoder(config.adapter.kind, config.adapter.image_encoder, config.adapter.identity)


def _require_encoder(kind: str, image_encoder: str) -> None:
    if not image_encoder:
        raise UserError(f"config key adapter.image_encoder: is empty; {kind} needs the folder of a "
                        "CLIPVisionModelWithProjection or CLIPModel")  # fmt: skip


def encoder_hash(config: ConfigDict, index: Index) -> str:
    """sha256 of the network by which :func:`encoder_of` reads concept images."""
    if config.adapter.kind == "face_id":
        identity = config.adapter.identity
        return processes.broadcast(lambda: index.hash(Path(identity))) if identity else "the embedded network"
    _require_encoder(config.adapter.kind, config.adapter.image_encoder)
    return processes.broadcast(lambda: folder_hash(config.adapter.image_encoder, index))
