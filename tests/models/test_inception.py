"""The Inception network of FID against torch-fidelity's answers, which tests/goldens/inception.py asks for."""

import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hgdpo_jax.config import ASSETS
from hgdpo_jax.models.convert import abstract, from_torch, shapes
from hgdpo_jax.models.inception import FEATURES, FIDInception
from hgdpo_jax.pictures.read import read_image
from hgdpo_jax.scoring import sets
from tests.rounding import NETWORK

GOLDEN = Path(__file__).parents[1] / "goldens" / "inception.json"
COUNT, KEPT = 20, 16  # embedded photographs, and how many features of each the golden file has


def random_weights() -> dict[str, np.ndarray]:
    """Weights that keep activations near 1; each tensor is a function of its name."""

    def values(key: str, shape: tuple[int, ...]) -> np.ndarray:
        drawn = np.random.default_rng(list(key.encode())).standard_normal(shape, np.float32)
        if len(shape) > 1:
            return drawn * np.float32(math.sqrt(2 / math.prod(shape[1:])))
        return np.exp(0.3 * drawn) if key.endswith("running_var") else 0.2 * drawn + key.endswith("weight")

    return {key: values(key, shape) for key, shape in shapes(abstract(FIDInception, {})).items()}


def photographs() -> np.ndarray:
    """[20 96 96 3] uint8."""
    files = sorted((ASSETS / "portraits" / "photographs").glob("*.jpg"))[:COUNT]
    return np.stack([np.asarray(read_image(path)) for path in files])


def test_features_fid_and_kid_of_twenty_photographs_are_torch_fidelitys() -> None:
    """The same random weights. FID and KID of the first ten against the others, which are other people: KID's mean
    over pairs of different people is the published one's once every person has been beside every other."""
    expected, model = json.loads(GOLDEN.read_text()), abstract(FIDInception, {})
    from_torch(random_weights(), model)
    run = nnx.jit(lambda model, images: model(images))
    images = jnp.asarray(photographs(), jnp.float32) / 127.5 - 1.0
    found = np.concatenate([np.asarray(run(model, images[begin : begin + 10])) for begin in (0, 10)])
    assert found.shape == (COUNT, FEATURES)
    theirs = np.array(expected["features"])
    assert np.abs(found[:, :KEPT] - theirs).max() <= NETWORK * np.abs(theirs).max()

    half, turned, once = COUNT // 2, [], np.ones((1, COUNT // 2))
    for turn in range(half):
        first, others = found[:half, None], np.roll(found[half:, None], turn, axis=0)
        (row,) = sets.set_distances({"a": {sets.INCEPTION: first}}, {sets.INCEPTION: others}, once).values()
        turned.append({name: measure.value for name, measure in row.items()})
    assert turned[0]["fid"] == pytest.approx(expected["fid"], rel=1e-4)
    assert np.mean([row["kid"] for row in turned]) / 1000 == pytest.approx(expected["kid"], rel=1e-4)
