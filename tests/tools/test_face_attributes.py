"""The networks of landmarks, expressions, age and gender against @vladmandic/face-api's answers and against PyTorch.

python -m tests.tools.test_face_attributes MODEL_FOLDER      compares what is not embedded; goldens/face.sh
"""

import sys
from itertools import pairwise
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hgdpo_jax.config import ASSETS
from hgdpo_jax.faces.landmarks import FaceLandmarks
from hgdpo_jax.models.convert import load_model
from hgdpo_jax.run.errors import UserError
from tests.faces.test_networks import FLOAT16, GOLDEN, enlarged, manifest
from tests.rounding import NETWORK, assert_close
from tools.make_assets.attributes import EXPRESSIONS, AgeGender, FaceExpression
from tools.make_assets.face import from_npm

Weights = dict[str, np.ndarray]
NOISE = np.random.default_rng(0).uniform(-1, 1, (3, 112, 112, 3)).astype(np.float32)


def filled(shapes: dict[str, tuple[int, ...]]) -> Weights:
    """Random weights that keep the size of what they are multiplied with."""
    rng = np.random.default_rng(0)
    values = {}
    for name, shape in shapes.items():
        inputs = np.prod(shape[:2]) if name.endswith("depthwise_filter") else np.prod(shape[:-1])
        values[name] = (rng.standard_normal(shape) / np.sqrt(inputs + 1)).astype(np.float32)
    return values


def dense(name: str, inputs: int, outputs: int, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}/filters": (size, size, inputs, outputs), f"{name}/bias": (outputs,)}


def separable(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}/depthwise_filter": (3, 3, inputs, 1),
        f"{name}/pointwise_filter": (1, 1, inputs, outputs),
        f"{name}/bias": (outputs,),
    }


def linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}/weights": (inputs, outputs), f"{name}/bias": (outputs,)}


def dense_net(outputs: int) -> Weights:
    """Random weights with face-api's names and shapes."""
    shapes = {}
    for i, (before, after) in enumerate(pairwise((3, 32, 64, 128, 256))):
        shapes |= separable(f"dense{i}/conv0", before, after) if i else dense("dense0/conv0", before, after, 3)
        for j in (1, 2, 3):
            shapes |= separable(f"dense{i}/conv{j}", after, after)
    return filled(shapes | linear("fc", 256, outputs))


def xception() -> Weights:
    """Random weights with face-api's names and shapes."""
    shapes = dense("entry_flow/conv_in", 3, 32, 3)
    for block, before, after in (
        ("entry_flow/reduction_block_0", 32, 64),
        ("entry_flow/reduction_block_1", 64, 128),
        ("exit_flow/reduction_block", 128, 256),
    ):
        shapes |= separable(f"{block}/separable_conv0", before, after)
        shapes |= separable(f"{block}/separable_conv1", after, after)
        shapes |= dense(f"{block}/expansion_conv", before, after, 1)
    for i in (0, 1):
        for j in (0, 1, 2):
            shapes |= separable(f"middle_flow/main_block_{i}/separable_conv{j}", 128, 128)
    shapes |= separable("exit_flow/separable_conv", 256, 512)
    return filled(shapes | linear("fc/age", 512, 1) | linear("fc/gender", 512, 2))


class Torch:
    """face-api's networks by PyTorch, on its names. Even sizes, at a stride of 2, are filled up at the end alone."""

    def __init__(self, weights: Weights) -> None:
        self._weights = {name: torch.from_numpy(value) for name, value in weights.items()}

    def conv(self, x: torch.Tensor, name: str, stride: int) -> torch.Tensor:
        kernel = self._weights[f"{name}/filters"].permute(3, 2, 0, 1)
        if kernel.shape[-1] == 3:
            x = F.pad(x, (2 - stride, 1, 2 - stride, 1))
        return F.conv2d(x, kernel, self._weights[f"{name}/bias"], stride)

    def separable(self, x: torch.Tensor, name: str, stride: int = 1) -> torch.Tensor:
        kernel = self._weights[f"{name}/depthwise_filter"].permute(2, 3, 0, 1)
        x = F.conv2d(F.pad(x, (2 - stride, 1, 2 - stride, 1)), kernel, stride=stride, groups=x.shape[1])
        return F.conv2d(x, self._weights[f"{name}/pointwise_filter"].permute(3, 2, 0, 1), self._weights[f"{name}/bias"])

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ self._weights[f"{name}/weights"] + self._weights[f"{name}/bias"]

    def pixels(self, images: np.ndarray) -> torch.Tensor:
        x = (torch.from_numpy(images) + 1) * 127.5 - torch.tensor([122.782, 117.001, 104.298])
        return x.permute(0, 3, 1, 2) / 255

    def dense_net(self, images: np.ndarray) -> torch.Tensor:
        x = self.pixels(images)
        for i in range(4):
            first = self.separable(x, f"dense{i}/conv0", 2) if i else self.conv(x, "dense0/conv0", 2)
            one = first.relu()
            two = self.separable(one, f"dense{i}/conv1")
            three = self.separable((one + two).relu(), f"dense{i}/conv2")
            four = self.separable((one + two + three).relu(), f"dense{i}/conv3")
            x = (one + two + three + four).relu()
        return self.linear(F.avg_pool2d(x, 7, 2).flatten(1), "fc")

    def reduction(self, x: torch.Tensor, name: str) -> torch.Tensor:
        h = self.separable(x.relu(), f"{name}/separable_conv0")
        h = self.separable(h.relu(), f"{name}/separable_conv1")
        h = F.max_pool2d(F.pad(h, (0, 1, 0, 1), value=-torch.inf), 3, 2)
        return h + self.conv(x, f"{name}/expansion_conv", 2)

    def age_and_gender(self, images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.conv(self.pixels(images), "entry_flow/conv_in", 2).relu()
        x = self.reduction(self.reduction(x, "entry_flow/reduction_block_0"), "entry_flow/reduction_block_1")
        for i in (0, 1):
            h = x
            for j in (0, 1, 2):
                h = self.separable(h.relu(), f"middle_flow/main_block_{i}/separable_conv{j}")
            x = x + h
        x = self.separable(self.reduction(x, "exit_flow/reduction_block"), "exit_flow/separable_conv").relu()
        x = F.avg_pool2d(x, 7, 2).flatten(1)
        return self.linear(x, "fc/age")[:, 0], self.linear(x, "fc/gender").softmax(-1)


def test_landmarks_are_those_of_face_api() -> None:
    ours = np.asarray(
        load_model(FaceLandmarks, ASSETS / "face" / "landmarks")(jnp.asarray(enlarged(112)) / 127.5 - 1.0)
    )
    theirs = np.array(GOLDEN["landmarks"]).reshape(-1, 68, 2)
    assert np.abs(ours - theirs).max() < 2 * FLOAT16  # of a picture's side


def test_landmarks_are_fractions_whatever_the_size() -> None:
    landmarks = load_model(FaceLandmarks, ASSETS / "face" / "landmarks")
    found, expected = (np.asarray(landmarks(jnp.asarray(enlarged(size)) / 127.5 - 1.0)) for size in (224, 112))
    assert np.abs(found - expected).max() < 0.03  # three pixels: the one is interpolated twice, and blurred by that


def test_landmarks_from_the_package_are_those_of_its_formula(tmp_path: Path) -> None:
    weights = dense_net(136)
    found = from_npm(manifest(tmp_path, weights, name="face_landmark_68_model"), FaceLandmarks)(jnp.asarray(NOISE))
    assert_close(found, Torch(weights).dense_net(NOISE).reshape(-1, 68, 2), NETWORK)


def test_expressions_from_the_package_are_those_of_its_formula(tmp_path: Path) -> None:
    weights = dense_net(7)
    found = from_npm(manifest(tmp_path, weights, name="face_expression_model"), FaceExpression)(jnp.asarray(NOISE))
    assert_close(found, Torch(weights).dense_net(NOISE).softmax(-1), NETWORK)
    assert list(GOLDEN["expressions"][0]) == list(EXPRESSIONS)


def test_age_and_gender_from_the_package_are_those_of_its_formula(tmp_path: Path) -> None:
    weights = xception()
    age, male = from_npm(manifest(tmp_path, weights, name="age_gender_model"), AgeGender)(jnp.asarray(NOISE))
    expected, gender = Torch(weights).age_and_gender(NOISE)
    assert_close(age, expected, NETWORK)
    assert_close(male, gender[:, 0], NETWORK)
    assert_close(1.0 - male, gender[:, 1], NETWORK)


def test_another_network_is_refused(tmp_path: Path) -> None:
    manifest(tmp_path, dense_net(7), name="face_landmark_68_model")
    with pytest.raises(UserError, match=f"^{tmp_path}/face_landmark_68_model: weight fc"):
        from_npm(tmp_path, FaceLandmarks)


def compare(folder: Path) -> None:
    """Expressions, ages and genders, whose weights are not embedded, against face-api's."""
    images = jnp.asarray(enlarged(112)) / 127.5 - 1.0
    expressions = np.asarray(from_npm(folder, FaceExpression)(images))
    theirs = np.array([[answer[name] for name in EXPRESSIONS] for answer in GOLDEN["expressions"]])
    age, male = map(np.asarray, from_npm(folder, AgeGender)(images))
    ages = np.array([answer["age"] for answer in GOLDEN["people"]])
    shares = np.array([answer["genderProbability"] for answer in GOLDEN["people"]])
    males = np.where([answer["gender"] == "male" for answer in GOLDEN["people"]], shares, 1.0 - shares)
    for name, found, expected in (("expressions", expressions, theirs), ("ages", age, ages), ("genders", male, males)):
        print(f"{name}: at most {np.abs(found - expected).max():.2g} from face-api's")
        assert_close(found, expected, NETWORK, name=name)


if __name__ == "__main__":
    compare(Path(sys.argv[1]))
