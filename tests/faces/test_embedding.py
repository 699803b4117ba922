"""Faces of the embedded portraits, found, cut out, aligned and recognised; and networks of the user's."""

import functools
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from hgdpo_jax.config import ASSETS
from hgdpo_jax.data.photographs import list_photographs
from hgdpo_jax.data.pixels import load_images
from hgdpo_jax.faces import quality
from hgdpo_jax.faces.alignment import align, similarity
from hgdpo_jax.faces.detection import FaceDetector, crop
from hgdpo_jax.faces.embedding import Embedded, FaceEmbedder
from hgdpo_jax.run.errors import UserError
from tests.faces.test_networks import GOLDEN, enlarged
from tests.rounding import EPS, assert_close

_, PORTRAITS = load_images(list_photographs(ASSETS / "portraits", "heldout"), (64, 64))
# insightface's five points in a crop of 112x112 pixels, whose centres are whole numbers: eyes, nose, mouth's corners.
TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
NOISE = np.random.default_rng(0).uniform(-1, 1, PORTRAITS.shape).astype(np.float32)


def shifted(images: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Moved by up to four pixels, the border mirrored."""
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="reflect")
    return padded[:, 4 + rows : 68 + rows, 4 + columns : 68 + columns]


def turned(degrees: float, scale: float = 1.0) -> np.ndarray:
    """The matrix of a similarity: from the x axis towards the y axis, which points down."""
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return scale * np.array([[cos, -sin], [sin, cos]])


def network(path: Path, size: int = 112, count: int | str = "n", inputs: int = 1, outputs: int = 5) -> str:
    """An ONNX file: mean of each channel times a matrix, plus a bias."""
    names = [f"data{i}" for i in range(inputs)]
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal(shape).astype(np.float32) for shape in ((3, outputs), outputs)]
    graph = helper.make_graph(
        [
            helper.make_node("GlobalAveragePool", [names[0]], ["mean"]),
            helper.make_node("Flatten", ["mean"], ["flat"]),
            helper.make_node("Gemm", ["flat", "w", "c"], ["embedding"]),
        ],
        "arcface",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [count, 3, size, size]) for name in names],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [count, outputs])],
        [numpy_helper.from_array(value, name) for value, name in zip(weights, "wc", strict=True)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return str(path)


@pytest.fixture(scope="module")
def portraits(identity: FaceEmbedder) -> Embedded:
    return identity.embed(PORTRAITS)


def test_faces_are_found_in_portraits_and_none_in_noise(portraits: Embedded, identity: FaceEmbedder) -> None:
    assert portraits.embedding.shape == (len(PORTRAITS), 128)
    assert portraits.found.mean() >= 0.95
    assert not identity.embed(NOISE).found.any()


@pytest.mark.parametrize("change", ["shift", "brighten", "mirror"])
def test_a_person_is_nearer_to_himself_than_to_others(portraits: Embedded, identity: FaceEmbedder, change: str) -> None:
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


def test_distances_are_euclidean_or_one_less_the_cosine(identity: FaceEmbedder, tmp_path: Path) -> None:
    a, b = np.array([[1.0, 0.0], [3.0, 4.0]], np.float32), np.array([[0.0, 2.0], [6.0, 8.0]], np.float32)
    np.testing.assert_allclose(identity.distance(a, b), [5**0.5, 5.0], rtol=1e-6)
    np.testing.assert_allclose(FaceEmbedder(network(tmp_path / "a.onnx")).distance(a, b), [1.0, 0.0], atol=1e-6)


def test_boxes_follow_the_face_and_do_without(faces: FaceDetector) -> None:
    canvas = np.zeros((4, 128, 192, 3), np.float32)
    canvas[:3, 40:104, 100:164] = PORTRAITS[:3]
    boxes, found, _ = (np.asarray(x) for x in faces.detect(canvas))
    centre = 0.5 * (boxes[:3, :2] + boxes[:3, 2:])
    assert found.tolist() == [True, True, True, False] and np.abs(centre - [132, 72]).max() < 12
    assert boxes[3].tolist() == [32, 0, 160, 128]


def test_crops_are_squares_inside_the_image() -> None:
    rows, columns = np.meshgrid(np.arange(20.0), np.arange(30.0), indexing="ij")
    ramp = np.stack([columns, rows, 0 * rows], axis=-1)[None].astype(np.float32)

    def bounds(box: list[float], size: int) -> list[float]:
        face = np.asarray(crop(ramp, np.array([box], np.float32), size))[0]
        half = 0.5 * (face[0, 1, 0] - face[0, 0, 0])  # half a pixel of the crop, in pixels of the image
        return [*(face[0, 0, :2] + 0.5 - half), *(face[-1, -1, :2] + 0.5 + half)]

    assert bounds([6, 4, 12, 14], 20) == pytest.approx([4, 4, 14, 14], abs=0.2)  # as wide as the box is high
    # Positions are rounded by EPS of the 30 pixels, and a pixel further the ramp is 1 higher.
    same = functools.partial(assert_close, tolerance=10 * EPS, size=30)
    same(crop(ramp, np.array([[4, 4, 14, 14]], np.float32), 10)[0], ramp[0, 4:14, 4:14])
    # Moved inside at the corner; as large as the image's shorter side where the box is larger.
    same(crop(ramp, np.array([[24, -3, 34, 7]], np.float32), 10)[0], ramp[0, :10, 20:])
    same(crop(ramp, np.array([[-5, -5, 35, 25]], np.float32), 20)[0], ramp[0, :, 5:25])


def test_similarities_are_the_least_squares_solution() -> None:
    rng = np.random.default_rng(0)
    sources = TEMPLATE + rng.normal(0, 8, (4, 5, 2))
    found = similarity(jnp.asarray(sources, jnp.float32), jnp.asarray(TEMPLATE))
    for points, ours in zip(sources, found, strict=True):
        (x, y), one, zero = points.T, np.ones(5), np.zeros(5)
        equations = np.concatenate([np.stack([x, -y, one, zero], 1), np.stack([y, x, zero, one], 1)])
        a, b, s, t = np.linalg.lstsq(equations, TEMPLATE.T.ravel())[0]
        assert_close(ours, [[a, -b, s], [b, a, t]], 10 * EPS, size=100)  # coordinates up to 100, some ten in a row


def test_a_known_similarity_is_found() -> None:
    turn, shift = turned(-25, 1.7), np.array([3.0, -8.0])
    found = similarity(jnp.asarray((TEMPLATE - shift) @ np.linalg.inv(turn).T)[None], jnp.asarray(TEMPLATE))
    assert_close(found[0], np.column_stack([turn, shift]), 10 * EPS, size=100)


def test_aligned_points_lie_on_the_template() -> None:
    """On pictures whose values are the pixels' own positions, which bilinear interpolation keeps."""
    rows, columns = np.meshgrid(np.arange(180.0) + 0.5, np.arange(200.0) + 0.5, indexing="ij")
    ramp = np.stack([columns, rows, 0 * rows], axis=-1)[None].astype(np.float32)
    points = (TEMPLATE - 56) @ turned(20, 0.8).T + [104, 92]
    face = np.asarray(align(ramp, points[None].astype(np.float32)))[0, :, :, :2]
    at = TEMPLATE.astype(int)
    (x, y), part = at.T, TEMPLATE - at
    upper, lower = (face[y + i, x] * (1 - part[:, :1]) + face[y + i, x + 1] * part[:, :1] for i in (0, 1))
    assert_close(upper * (1 - part[:, 1:]) + lower * part[:, 1:], points, 10 * EPS, size=200)


@pytest.mark.parametrize(("degrees", "scale", "move"), [(30, 1, (0, 0)), (0, 1.5, (0, 0)), (-15, 0.8, (9.3, -6.1))])
def test_a_moved_picture_gives_the_same_aligned_crop(degrees: float, scale: float, move: tuple[float, float]) -> None:
    size, frequency, turn = 240, 0.1, turned(degrees, scale)

    def waves(turn: np.ndarray, shift: np.ndarray) -> np.ndarray:
        """The crop, by the points at turn x + shift of a picture that shows there what is at x in all of them."""
        positions = np.stack(np.meshgrid(np.arange(size) + 0.5, np.arange(size) + 0.5), -1)
        x, y = np.moveaxis((positions - shift) @ np.linalg.inv(turn).T * frequency, -1, 0)
        picture = np.stack([np.sin(x), np.cos(y), np.sin(x + 1) * np.sin(y)], -1)
        points = (TEMPLATE - 56) @ turn.T + shift
        return np.asarray(align(picture[None].astype(np.float32), points[None].astype(np.float32)))

    centre = np.full(2, size / 2)
    # Bilinear interpolation errs by 1/8 of the second derivatives along rows and along columns: frequency squared each.
    errors = frequency**2 / 4 * (1 + 1 / scale**2)
    assert_close(waves(turn, centre + move), waves(turned(0), centre), errors, size=1)


def test_beyond_the_image_aligned_crops_are_black() -> None:
    face = np.asarray(align(np.ones((1, 60, 60, 3), np.float32), (TEMPLATE[None] + 0.5).astype(np.float32)))[0]
    assert (face[:60, :60] == 1).all() and (face[60:] == -1).all() and (face[:, 60:] == -1).all()


def test_points_are_those_of_face_api(faces: FaceDetector) -> None:
    """By its own detections: it cuts whole pixels out, blackens what is beyond the box, and scales otherwise."""
    images = np.pad(enlarged(112), ((0, 0), (56, 56), (56, 56), (0, 0))) / 127.5 - 1.0
    boxes, found, _ = (np.asarray(x) for x in faces.detect(images))
    points = np.asarray(faces.points(images, boxes))
    expected = np.array(GOLDEN["points"])
    eyes = np.linalg.norm(expected[:, 0] - expected[:, 1], axis=-1)
    assert found.all() and points.shape == (3, 5, 2)
    assert (np.abs(points - expected).max((1, 2)) < 0.1 * eyes).all()
    assert ((points > boxes[:, None, :2]) & (points < boxes[:, None, 2:])).all()


def test_points_turn_with_the_picture(faces: FaceDetector) -> None:
    pictures = [Image.fromarray(np.uint8(np.round((x + 1) * 127.5))).resize((192, 192)) for x in PORTRAITS[:10]]

    def points(degrees: float) -> np.ndarray:
        rotated = [picture.rotate(-degrees, Image.Resampling.BILINEAR) for picture in pictures]  # Pillow's y points up
        images = np.stack([np.asarray(p) for p in rotated]).astype(np.float32) / 127.5 - 1
        return np.asarray(faces.points(images, faces.detect(images).boxes))

    level = points(0)
    for degrees in (-20, 20):
        expected = (level - 96) @ turned(degrees).T + 96
        distance = np.linalg.norm(points(degrees) - expected, axis=-1).mean(1)
        assert np.median(distance / np.linalg.norm(level[:, 0] - level[:, 1], axis=-1)) < 0.06  # some slip


def test_an_arcface_network_sees_aligned_faces(tmp_path: Path, faces: FaceDetector) -> None:
    path, last = network(tmp_path / "a.onnx"), len(PORTRAITS) - 1
    images = np.concatenate([PORTRAITS[:last], NOISE[:1]])
    embedded, found, scores = FaceEmbedder(path).embed(images)
    aligned = align(images, faces.points(images, faces.detect(images).boxes))
    square = crop(images, np.full((last + 1, 4), [0, 0, 64, 64], np.float32), 112)
    seen = np.concatenate([aligned[:last], square[last:]])
    weights = [numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer]
    assert found[:3].all() and not found[last] and scores[last] < scores[found].min()
    expected = seen.mean((1, 2), dtype=np.float64) @ weights[0] + weights[1]
    # Sums of 112² pixels, at least four side by side.
    assert_close(embedded[found], expected[found], 112**2 / 4 * EPS / 2)
    assert_close(embedded[last], expected[last], 112**2 / 4 * EPS / 2)


def test_an_arcface_network_with_a_batch_of_one_sees_rgb_of_the_face(tmp_path: Path) -> None:
    path = network(tmp_path / "a.onnx", count=1)
    brightness = np.linspace(0, 1, len(PORTRAITS), dtype=np.float32)[:, None, None, None]
    images = np.broadcast_to(np.array([-0.5, 0.25, 1.0], np.float32), PORTRAITS.shape) * brightness
    found = FaceEmbedder(path).embed(images)
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
        FaceEmbedder(str(path))
    assert "\n" not in str(error.value)
    reason = {"missing": "no such file", "text": "not an ONNX file", "empty": "not an ONNX file"}
    assert reason.get(mistake, "give an ArcFace network") in str(error.value)


def test_the_quality_of_a_face_is_the_networks_number_and_that_of_none_zero(
    tmp_path: Path, faces: FaceDetector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a network whose formula is known: of each channel's mean over the aligned face."""
    monkeypatch.setattr(quality, "FaceDetector", lambda: faces)  # which is compiled
    pictures = np.concatenate([PORTRAITS[:-1], NOISE[:1]])
    rng = np.random.default_rng(0)
    weights, bias = rng.standard_normal((3, 1)), rng.standard_normal(1)
    at = faces.detect(pictures)
    aligned = np.asarray(align(pictures, faces.points(pictures, at.boxes)), np.float64)
    expected = np.where(at.found, (aligned.mean((1, 2)) @ weights + bias)[:, 0], 0.0)
    found = quality.FaceQuality(network(tmp_path / "quality.onnx", outputs=1))(jnp.asarray(pictures))
    assert_close(found, expected, 10 * EPS, size=3)
    assert found[-1] == 0 and (found != 0).mean() > 0.9
    with pytest.raises(UserError, match=r"arcface\.onnx: gives \(5,\) for a face; expected one number"):
        quality.FaceQuality(network(tmp_path / "arcface.onnx"))(jnp.asarray(pictures))
