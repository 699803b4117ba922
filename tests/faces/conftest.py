"""One detector for all tests of faces: it is compiled once for each shape."""

from collections.abc import Iterator

import pytest

from hgdpo_jax.faces import concepts, embedding
from hgdpo_jax.faces.detection import FaceDetector
from hgdpo_jax.faces.embedding import FaceEmbedder


@pytest.fixture(scope="session")
def faces() -> FaceDetector:
    return FaceDetector()


@pytest.fixture(scope="session")
def identity(faces: FaceDetector) -> FaceEmbedder:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedding, "FaceDetector", lambda: faces)
        return FaceEmbedder()


@pytest.fixture(scope="module", autouse=True)
def compiled_once(faces: FaceDetector, identity: FaceEmbedder) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedding, "FaceDetector", lambda: faces)
        patch.setattr(concepts, "FaceDetector", lambda: faces)
        patch.setattr(concepts, "FaceEmbedder", lambda path: FaceEmbedder(path) if path else identity)
        yield
