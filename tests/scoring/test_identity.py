"""Faces of the embedded portraits, found, cut out and told apart; and networks of the user's."""

import functools
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hgdpo_jax.config import ASSETS
from hgdpo_jax.data.photographs import list_photographs, load_images
from hgdpo_jax.errors import UserError
from hgdpo_jax.scoring.identity import Embedded, Faces, Identity, crop
from tests.rounding import EPS, assert_close

_, PORTRAITS = load_images(list_photographs(ASSETS / "portraits", "heldout"), (64, 64))
NOISE = np.random.default_rng(0).uniform(-1, 1, PORTRAITS.shape).astype(np.float32)


def shifted(images: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Moved by up to four pixels, the border mirrored."""
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="reflect")
    return padded[:, 4 + rows : 68 + rows, 4 + columns : 68 + columns]


def network(path: Path, size: int = 112, count: int | str = "n", inputs: int = 1) -> str:
    """An ONNX file: mean of each channel times a matrix, plus a bias."""
    names = [f"data{i}" for i in range(inputs)]
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((3, 5)).astype(np.float32), rng.standard_normal(5).astype(np.float32)]
    graph = helper.make_graph(
        [
            helper.make_node("GlobalAveragePool", [names[0]], ["mean"]),
            helper.make_node("Flatten", ["mean"], ["flat"]),
            helper.make_node("Gemm", ["flat", "w", "c"], ["embedding"]),
        ],
        "arcface",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [count, 3, size, size]) for name in names],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [count, 5])],
        [numpy_helper.from_array(value, name) for value, name in zip(weights, "wc", strict=True)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return str(path)


@pytest.fixture(scope="module")
def identity() -> Identity:
    return Identity()


@pytest.fixture(scope="module")
def portraits(identity: Identity) -> Embedded:
    return identity.embed(PORTRAITS)


def test_a_face_is_found_in_every_portrait_and_none_in_noise(portraits: Embedded, identity: Identity) -> None:
    assert portraits.embedding.shape == (len(PORTRAITS), 128) and portraits.found.all()
    assert not identity.embed(NOISE).found.any()


@pytest.mark.parametrize("change", ["shift", "brighten", "mirror"])
def test_a_person_is_nearer_to_himself_than_to_others(portraits: Embedded, identity: Identity, change: str) -> None:
    copies = {
        "shift": shifted(PORTRAITS, 3, -3),
        "brighten": np.clip(0.9 * PORTRAITS + 0.2, -1, 1),
        "mirror": PORTRAITS[:, :, ::-1],
    }[change]
    a, b = portraits.embedding, identity.embed(copies).embedding
    same = identity.distance(a, b)
    others = np.stack([identity.distance(a, np.roll(b, i, axis=0)) for i in range(1, len(a))])
    assert same.shape == (len(a),) and same.mean() < 0.4 and others.mean() > 0.7
    assert (same < others.min(0)).mean() >= 0.9
    assert (same < 0.6).mean() >= 0.95 and (others > 0.6).mean() >= 0.9


def test_distances_are_euclidean_or_one_less_the_cosine(identity: Identity, tmp_path: Path) -> None:
    a, b = np.array([[1.0, 0.0], [3.0, 4.0]], np.float32), np.array([[0.0, 2.0], [6.0, 8.0]], np.float32)
    np.testing.assert_allclose(identity.distance(a, b), [5**0.5, 5.0], rtol=1e-6)
    np.testing.assert_allclose(Identity(network(tmp_path / "a.onnx")).distance(a, b), [1.0, 0.0], atol=1e-6)


def test_boxes_follow_the_face_and_do_without() -> None:
    faces = Faces()
    canvas = np.zeros((4, 128, 192, 3), np.float32)
    canvas[:, 40:104, 100:164] = PORTRAITS[:4]
    boxes, found = (np.asarray(x) for x in faces.find(canvas))
    centre = 0.5 * (boxes[:, :2] + boxes[:, 2:])
    assert found.all() and np.abs(centre - [132, 72]).max() < 12
    boxes, found = (np.asarray(x) for x in faces.find(np.zeros((1, 64, 100, 3), np.float32)))
    assert not found.any() and boxes.tolist() == [[18, 0, 82, 64]]


def test_crops_are_squares_inside_the_image() -> None:
    rows, columns = np.meshgrid(np.arange(20.0), np.arange(30.0), indexing="ij")
    ramp = np.stack([columns, rows, 0 * rows], axis=-1)[None].astype(np.float32)

    def bounds(box: list[float], size: int, rise: float = 0.0) -> list[float]:
        face = np.asarray(crop(ramp, np.array([box], np.float32), size, rise))[0]
        half = 0.5 * (face[0, 1, 0] - face[0, 0, 0])  # half a pixel of the crop, in pixels of the image
        return [*(face[0, 0, :2] + 0.5 - half), *(face[-1, -1, :2] + 0.5 + half)]

    assert bounds([6, 4, 12, 14], 20) == pytest.approx([4, 4, 14, 14], abs=0.2)  # as wide as the box is high
    assert bounds([6, 4, 12, 14], 20, 0.2) == pytest.approx([4, 2, 14, 12], abs=0.2)
    # Positions are rounded by EPS of the 30 pixels, and a pixel further the ramp is 1 higher.
    same = functools.partial(assert_close, tolerance=10 * EPS, size=30)
    same(crop(ramp, np.array([[4, 4, 14, 14]], np.float32), 10)[0], ramp[0, 4:14, 4:14])
    # Moved inside at the corner; as large as the image's shorter side where the box is larger.
    same(crop(ramp, np.array([[24, -3, 34, 7]], np.float32), 10)[0], ramp[0, :10, 20:])
    same(crop(ramp, np.array([[-5, -5, 35, 25]], np.float32), 20)[0], ramp[0, :, 5:25])


@pytest.mark.parametrize("count", ["n", 1])
def test_an_arcface_network_sees_rgb_of_the_face(tmp_path: Path, count: int | str) -> None:
    path = network(tmp_path / "a.onnx", count=count)
    images = np.broadcast_to(np.array([-0.5, 0.25, 1.0], np.float32), (3, 64, 64, 3)) * np.array([1, 0.5, 0])[
        :, None, None, None
    ].astype(np.float32)
    found = Identity(path).embed(images)
    weights = [numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer]
    expected = images[:, 0, 0] @ weights[0] + weights[1]
    # ONNX Runtime adds up 112² equal values, at least four side by side: each sum is rounded by EPS/2.
    assert_close(found.embedding, expected, 112**2 / 4 * EPS / 2)
    assert not found.found.any()


@pytest.mark.parametrize("mistake", ["missing", "text", "empty", "size", "batch", "inputs"])
def test_a_network_that_is_none_is_named(tmp_path: Path, mistake: str) -> None:
    path = tmp_path / "face.onnx"
    if mistake in ("text", "empty"):
        path.write_bytes(b"not a network" if mistake == "text" else b"")
    elif mistake != "missing":
        network(path, *{"size": (128,), "batch": (112, 4), "inputs": (112, "n", 2)}[mistake])
    with pytest.raises(UserError, match=f"^face network {path}: ") as error:
        Identity(str(path))
    assert "\n" not in str(error.value)
    reason = {"missing": "no such file", "text": "not an ONNX file", "empty": "not an ONNX file"}
    assert reason.get(mistake, "give an ArcFace network") in str(error.value)
