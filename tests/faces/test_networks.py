"""The face networks against @vladmandic/face-api's own answers.

python -m tests.faces.test_networks FOLDER      writes the golden inputs that goldens/face.js reads
"""

import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from hgdpo_jax.config import ASSETS
from hgdpo_jax.faces.networks import FaceRecognition, TinyFaceDetector
from hgdpo_jax.models.convert import abstract, from_torch, keys, load_model
from hgdpo_jax.run.errors import UserError
from tests.rounding import EPS, NETWORK, assert_close
from tools.make_assets.face import layer_weights, read_manifest, recognition_weights

GOLDEN = json.loads((Path(__file__).parent.parent / "goldens" / "face.json").read_text())
NAMES = ("000f.jpg", "000m.jpg", "001f.jpg")
SIZES = (112, 150, 224, 320)
FLOAT16 = 2**-11  # what the embedded weights are rounded by; theirs are not, and float32 rounds a thousand times less


def enlarged(size: int) -> np.ndarray:
    """Three portraits, bilinear, whole numbers of 0…255, float32 [3, size, size, 3]."""
    folder = ASSETS / "portraits" / "photographs"
    images = np.stack([np.asarray(Image.open(folder / name)) for name in NAMES]).astype(np.float64)
    side = images.shape[1]
    at = np.clip((np.arange(size) + 0.5) * side / size - 0.5, 0, side - 1)
    low = np.minimum(at.astype(int), side - 2)
    part = (at - low)[:, None]
    rows = images[:, low] * (1 - part[:, None]) + images[:, low + 1] * part[:, None]
    return np.round(rows[:, :, low] * (1 - part) + rows[:, :, low + 1] * part).astype(np.float32)


def manifest(folder: Path, weights: dict[str, np.ndarray], data: bytes | None = None, name: str = "m") -> Path:
    """A model of TensorFlow.js: bytes with scale 0.1 and min -1, floats as they are."""
    entries = []
    for key, value in weights.items():
        entry = {"name": key, "shape": value.shape, "dtype": "float32"}
        if value.dtype == np.uint8:
            entry["quantization"] = {"dtype": "uint8", "scale": 0.1, "min": -1.0}
        entries.append(entry)
    groups = [{"weights": entries, "paths": [f"{name}.bin"]}]
    (folder / f"{name}-weights_manifest.json").write_text(json.dumps(groups))
    values = b"".join(value.tobytes() for value in weights.values())
    (folder / f"{name}.bin").write_bytes(values if data is None else data)
    return folder


def test_embeddings_are_those_of_face_api() -> None:
    ours = np.asarray(
        load_model(FaceRecognition, ASSETS / "face" / "recognition")(jnp.asarray(enlarged(150)) / 127.5 - 1.0)
    )
    theirs = np.array(GOLDEN["descriptors"])
    assert np.linalg.norm(ours - theirs, axis=1).max() < 3 * FLOAT16 * np.linalg.norm(theirs, axis=1).max()


def test_boxes_and_scores_are_those_of_face_api() -> None:
    size, detector = 224, load_model(TinyFaceDetector, ASSETS / "face" / "detector")
    boxes, scores = detector(jnp.asarray(enlarged(size)) / 127.5 - 1.0, size)
    for box, score, golden in zip(np.asarray(boxes), np.asarray(scores), GOLDEN["faces"][str(size)], strict=True):
        for number, (expected, *place) in enumerate(golden):
            nearest = np.abs(box - place).max(-1).argmin()
            assert score[nearest] == pytest.approx(expected, abs=4 * FLOAT16)  # of at most 1
            assert np.abs(box[nearest] - place).max() < FLOAT16 * size
            assert number > 0 or nearest == score.argmax()


def test_a_picture_that_is_not_square_is_filled_up() -> None:
    detector = load_model(TinyFaceDetector, ASSETS / "face" / "detector")
    wide = np.full((3, 224, 300, 3), -1.0, np.float32)
    wide[:, :, 40:264] = enlarged(224) / 127.5 - 1.0
    square = np.concatenate([wide, np.full((3, 76, 300, 3), -1.0, np.float32)], axis=1)
    found = detector(jnp.asarray(wide), 224)
    for ours, expected in zip(found, detector(jnp.asarray(square), 224), strict=True):
        assert_close(ours, expected, NETWORK)
    boxes, scores = map(np.asarray, found)
    left, top, right, bottom = boxes[np.arange(3), scores.argmax(1)].T
    around = 11  # pixels, a twentieth: so far a box may reach out of the photograph
    assert ((left > 40 - around) & (right < 264 + around) & (top > -around) & (bottom < 224 + around)).all()
    assert scores.max(1).min() > 0.5


def test_8_bit_weights_are_multiplied_out(tmp_path: Path) -> None:
    stored = {"a/b": np.arange(6, dtype=np.uint8).reshape(2, 3), "c": np.array([0.3, -7.0], np.float32)}
    found = read_manifest(manifest(tmp_path, stored), "m")
    np.testing.assert_allclose(found["a/b"], [[-1.0, -0.9, -0.8], [-0.7, -0.6, -0.5]], rtol=1e-6)
    assert np.array_equal(found["c"], stored["c"]) and found["a/b"].dtype == np.float32


def test_embedded_weights_are_those_that_face_api_computes_with() -> None:
    recognition = load_model(FaceRecognition, ASSETS / "face" / "recognition")
    detector = load_model(TinyFaceDetector, ASSETS / "face" / "detector")
    ours = {
        "fc": recognition.fc.kernel,
        "conv2/depthwise_filter": detector.conv2.depthwise.kernel,
        "conv8/bias": detector.conv8.bias,
    }
    for name, parameter in ours.items():
        np.testing.assert_allclose(np.ravel(parameter[...])[:8], GOLDEN["weights"][name], rtol=1e-3, atol=1e-6)


def test_scale_layers_are_folded() -> None:
    rng = np.random.default_rng(0)
    model = abstract(FaceRecognition, {"image_size": 150})
    stored = {"fc": rng.standard_normal((256, 128)).astype(np.float32)}
    for key in keys(model):
        if key.endswith(".bias"):
            layer = key.removesuffix(".bias").replace(".", "/")
            width = int(layer.split("_")[0].removeprefix("conv"))
            size, inputs = (7, 3) if layer == "conv32_down" else (3, width)
            if layer.endswith("_down/conv1"):
                inputs //= 2
            stored[f"{layer}/conv/filters"] = rng.standard_normal((size, size, inputs, width)).astype(np.float32)
            for kind in ("conv/bias", "scale/weights", "scale/biases"):
                stored[f"{layer}/{kind}"] = rng.standard_normal(width).astype(np.float32)
    from_torch(recognition_weights(stored), model)
    patch = rng.standard_normal((1, 7, 7, 3)).astype(np.float32)
    plain = np.einsum("bhwi,hwio->o", patch, stored["conv32_down/conv/filters"]) + stored["conv32_down/conv/bias"]
    expected = plain * stored["conv32_down/scale/weights"] + stored["conv32_down/scale/biases"]
    assert_close(
        np.ravel(model.conv32_down(jnp.asarray(patch))), expected, 7 * 7 * 3 * EPS
    )  # so many products are added up


def test_depthwise_filters_keep_their_channels() -> None:
    stored = {"conv1/depthwise_filter": np.arange(18, dtype=np.float32).reshape(3, 3, 2, 1)}
    weights = layer_weights(stored)
    assert np.array_equal(weights["conv1.depthwise.weight"][1, 0], stored["conv1/depthwise_filter"][:, :, 1, 0])


@pytest.mark.parametrize("damage", ["missing", "no data", "short", "other"])
def test_a_damaged_model_is_named(tmp_path: Path, damage: str) -> None:
    if damage != "missing":
        manifest(tmp_path, {"a": np.zeros(4, np.float32)}, b"\0" * (7 if damage == "short" else 16))
    if damage == "no data":
        (tmp_path / "m.bin").unlink()
    if damage == "other":
        (tmp_path / "m-weights_manifest.json").write_text('[{"name": 1}]')
    with pytest.raises(UserError, match=f"^{tmp_path}/m.*(no such file|not a manifest)") as error:
        read_manifest(tmp_path, "m")
    assert "\n" not in str(error.value)


if __name__ == "__main__":
    for size in SIZES:
        enlarged(size).tofile(Path(sys.argv[1]) / f"{size}.raw")
