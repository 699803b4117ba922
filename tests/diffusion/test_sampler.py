"""How a sampler cuts work into batches and hands weights to programs, which stand-ins take the place of."""

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hgdpo_jax.diffusion import sampler as samplers
from hgdpo_jax.diffusion.pipeline import Pipeline
from hgdpo_jax.diffusion.sampler import Sampler
from hgdpo_jax.diffusion.schedule import NoiseSchedule
from hgdpo_jax.diffusion.stable_diffusion import STABLE_DIFFUSION
from hgdpo_jax.run.errors import UserError
from tests import tiny

SIZE = (4, 4)


class FakePipeline(Pipeline):
    """Latents are images."""

    def __init__(self) -> None:
        parts = {"schedule": NoiseSchedule.from_config({"clip_sample": False}), "family": STABLE_DIFFUSION, "index": {}}
        for name, part in parts.items():
            object.__setattr__(self, name, part)

    def latent_shape(self, resolution: tuple[int, int]) -> tuple[int, int, int]:
        return (*resolution, 3)

    def tokenize(self, captions: Any) -> np.ndarray:
        return np.array([[len(caption)] for caption in captions], np.int32)


class FakePrograms:
    """Drawings add the policy, the captions and where the trajectory starts to the latents."""

    def __init__(self, pipeline: Pipeline, mesh: Any, *settings: Any) -> None:
        self.given = {name: nnx.State({"x": nnx.Param(jnp.ones(()))}) for name in ("unet", "text", "vae")}
        self.shardings = jax.tree.map(lambda _: samplers.batch_sharding(tiny.mesh()), self.given)
        self.settings, self.batches = settings, []

    def draw(self, weights: Any, given: Any, inputs: Any, trajectory: Any, guidance: Any) -> jax.Array:
        self.batches.append(len(inputs.ids))
        self.weights, self.guidance = weights, guidance
        added = weights["unet"]["x"][...] + inputs.ids[:, 0] + trajectory.signal
        return inputs.latent + added[:, None, None, None]

    def decode(self, weights: Any, latents: jax.Array) -> jax.Array:
        return latents

    def encode(self, weights: Any, images: jax.Array) -> jax.Array:
        return 10 * images


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(samplers, "Programs", FakePrograms)
    monkeypatch.setattr(samplers, "place", lambda tree, _: jax.tree.map(jnp.asarray, tree))
    settings = {"solver": "ddim", "steps": 8, "guidance": 3.0, "batch": 2, "seed": 0}
    return lambda **more: Sampler(FakePipeline(), tiny.mesh(), **settings | more)


def test_work_is_cut_into_batches_of_one_size_and_padding_is_cut_off(make: Any) -> None:
    sampler, ids = make(), np.array([[1], [2], [3]], np.int32)
    keys = sampler.keys("a", ["x", "y", "z"], [0, 0, 0])
    found = sampler.generate(ids, keys, SIZE, "")
    assert found.shape == (3, *SIZE, 3) and found[:, 0, 0, 0].tolist() == [2, 3, 4]
    assert sampler._programs.batches == [2, 2]

    def measure(images: jax.Array, ids: jax.Array) -> jax.Array:
        return images[:, 0, 0, 0] * ids[:, 0]

    padded, _ = sampler.candidates(ids, keys, SIZE, measure, "")
    kept, scores = sampler.candidates(ids[:2], keys[:2], SIZE, measure, "")
    assert isinstance(padded, np.ndarray) and isinstance(kept, jax.Array)
    assert np.array_equal(padded, found) and scores.tolist() == [2, 6]
    assert sampler.measure_images(found, ids, measure, "").tolist() == [2, 6, 12]
    assert sampler.measure_latents(found, ids, measure, "").tolist() == [2, 6, 12]
    assert [sampler.whole_batches(each) for each in (1, 2, 3)] == [2, 1, 2]


def test_reconstructions_are_in_the_order_of_their_strengths_and_0_is_the_photograph(make: Any) -> None:
    sampler, ids = make(), np.array([[1], [2], [3]], np.int32)
    images = np.ones((3, *SIZE, 3), np.float32)
    keys = {strength: sampler.keys("a", ["x", "y", "z"], [strength] * 3) for strength in (7, 0, 2)}
    found, scores = sampler.reconstructions(images, ids, keys, lambda images, ids: images[:, 0, 0, 0], "")
    assert found.shape == (3, 3, *SIZE, 3) and np.array_equal(scores, found[:, :, 0, 0, 0])
    latents = sampler.encode(images, "")
    for i, strength in ((0, 7), (2, 2)):
        assert np.array_equal(found[:, i], sampler.reconstruct(latents, ids, keys[strength], strength, ""))
    assert np.array_equal(found[:, 1], latents) and (scores[:, 0] < scores[:, 2]).all()  # the weaker keeps more


def test_policies_take_the_place_of_what_was_given_until_others_do(make: Any) -> None:
    sampler, ids = make(negative="ugly"), np.zeros((2, 1), np.int32)
    keys = sampler.keys("a", ["x", "y"], [0, 0])

    def drawn(*policies: Any) -> tuple[float, set[str]]:
        sampler.use_policies(*policies)
        return float(sampler.generate(ids, keys, SIZE, "").mean()), set(sampler._programs.weights)

    five = {name: nnx.State({"x": nnx.Param(jnp.full((), 5.0))}) for name in ("unet", "text")}
    assert drawn({"unet": five["unet"]}, {"text": five["text"]}) == (5.0, {"unet", "text", "vae", "early text"})
    assert sampler._programs.weights["text"]["x"][...] == 1.0
    assert drawn() == (1.0, {"unet", "text", "vae"})
    assert sampler._programs.guidance.scale == 3.0 and sampler._programs.guidance.negative_ids.tolist() == [[4]]


def test_guidance_of_1_is_none_and_a_negative_prompt_says_so(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert make()._programs.settings[0] and not caplog.text
    with caplog.at_level(logging.WARNING):
        assert not make(guidance=1.0, negative="ugly")._programs.settings[0]
    assert "negative prompt 'ugly': has no effect, guidance 1 means none" in caplog.text
    with pytest.raises(UserError, match="sampler 'euler': expects ddpm, ddim, dpmpp_2m"):
        make(solver="euler")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_picture_of_nan_or_infinity_is_named(make: Any, value: float) -> None:
    latents = np.zeros((3, *SIZE, 3), np.float32)
    latents[1, 0, 0, 0] = value
    with pytest.raises(UserError, match=r"^looks, picture 1: NaN or infinity was drawn \(1 of 3\)"):
        make().decode(latents, "looks")
