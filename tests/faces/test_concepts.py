"""Concept images: the face of each is cut out and read as the adapter's kind says."""

from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from hgdpo_jax.faces.concepts import ConceptEncoder
from hgdpo_jax.faces.detection import FaceDetector, crop
from hgdpo_jax.faces.embedding import FaceEmbedder
from hgdpo_jax.models import ip_adapter
from hgdpo_jax.models.clip import CLIPModel
from hgdpo_jax.models.preprocessing import clip_normalised
from hgdpo_jax.run.errors import UserError
from tests import tiny
from tests.faces.test_embedding import NOISE, PORTRAITS
from tests.models.test_clip import TEXT, VISION
from tests.rounding import NETWORK, assert_close

IMAGES = np.concatenate([PORTRAITS[:-1], NOISE[:1]])  # as many as others detect: one program


def test_face_id_reads_embeddings_of_length_one(identity: FaceEmbedder) -> None:
    encoder = ConceptEncoder("face_id", "")
    features, found = encoder(IMAGES)
    expected = identity.embed(IMAGES).embedding
    assert_close(np.linalg.norm(features, axis=-1), np.ones((len(IMAGES), 1)), NETWORK)
    assert_close(features[:, 0] * np.linalg.norm(expected, axis=-1, keepdims=True), expected, NETWORK)
    assert found[:3].all() and not found[-1]
    assert encoder.nothing.shape == (1, 1, 128) and not encoder.nothing.any()


def test_the_other_kinds_read_clip_of_the_face(tmp_path: Path, faces: FaceDetector) -> None:
    config = {"text_config": TEXT, "vision_config": VISION, "projection_dim": 6}
    tiny.save_model(tiny.random_model(CLIPModel, config, 0), tmp_path)
    encoder = ConceptEncoder("ip_adapter", str(tmp_path))
    features, found = encoder(IMAGES)
    pixels = clip_normalised(crop(IMAGES, faces.detect(IMAGES).boxes, VISION["image_size"]))
    run = nnx.jit(lambda network, x: network(x).pooled)
    assert_close(features[:, 0], run(ip_adapter.load_image_encoder(tmp_path), pixels), NETWORK)
    assert encoder.nothing.shape == (1, 1, 6) and not encoder.nothing.any()
    assert found[:3].all() and not found[-1]


def test_a_missing_image_encoder_is_named() -> None:
    with pytest.raises(UserError, match="adapter.image_encoder: is empty; ip_adapter needs the folder"):
        ConceptEncoder("ip_adapter", "")
