"""Conversion is total and bijective."""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from diffusers import UNet2DConditionModel as TorchUNet
from flax import nnx

from hgdpo_jax.models.clip import CLIPModel
from hgdpo_jax.models.convert import abstract, from_torch, load_model, save_model, to_torch
from hgdpo_jax.models.flux2 import Flux2Transformer2DModel
from hgdpo_jax.models.flux2_vae import AutoencoderKLFlux2
from hgdpo_jax.models.unet import UNet2DConditionModel
from hgdpo_jax.models.vae import AutoencoderKL
from hgdpo_jax.run.errors import UserError
from tests import tiny
from tests.models import test_clip, test_flux2, test_flux2_vae, test_qwen3, test_vae
from tests.models.parity import numpy_weights, randomise

SD15, SDXL = tiny.TINY_UNET, tiny.TINY_XL


@pytest.mark.parametrize("config", [SD15, SDXL], ids=["sd15", "sdxl"])
def test_there_and_back_is_bit_for_bit(config: dict) -> None:
    weights = numpy_weights(randomise(TorchUNet.from_config(config)))
    model = abstract(UNet2DConditionModel, config)
    from_torch(weights, model)
    back = to_torch(model)
    assert back.keys() == weights.keys()
    assert all(back[key].shape == w.shape and np.array_equal(back[key], w) for key, w in weights.items())


CLIP = {"text_config": test_clip.TEXT, "vision_config": test_clip.VISION, "projection_dim": 6}


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (AutoencoderKL, test_vae.CONFIG),
        (CLIPModel, CLIP),
        (Flux2Transformer2DModel, test_flux2.CONFIG),
        (AutoencoderKLFlux2, test_flux2_vae.CONFIG),
        (test_qwen3.small, test_qwen3.CONFIG),
    ],
    ids=["vae", "clip", "flux2", "flux2_vae", "qwen3"],
)
def test_an_abstract_model_has_the_shapes_of_one_with_values(cls: Callable[..., nnx.Module], config: dict) -> None:
    real = nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0)))
    expected, found = (nnx.to_flat_state(nnx.state(model)) for model in (real, abstract(cls, config)))
    assert [path for path, _ in found] == [path for path, _ in expected]
    assert all(a.shape == b.shape and a.dtype == b.dtype for (_, a), (_, b) in zip(found, expected, strict=True))


def test_a_model_does_not_change_with_what_it_was_read_from() -> None:
    model, weights = abstract(UNet2DConditionModel, SD15), {}
    for key, value in numpy_weights(randomise(TorchUNet.from_config(SD15))).items():
        raw = np.empty(value.nbytes + 64, np.uint8)
        aligned = raw[-raw.ctypes.data % 64 :][: value.nbytes].view(np.float32).reshape(value.shape)
        aligned[...] = value  # where JAX could take it over
        weights[key] = aligned
    from_torch(weights, model)
    before = {key: value.copy() for key, value in to_torch(model).items()}
    for value in weights.values():
        value[...] = 0.0
    assert all(np.array_equal(value, before[key]) for key, value in to_torch(model).items())


@pytest.mark.parametrize("damage", ["missing", "superfluous", "shape", "flat", "number"])
def test_a_weight_that_does_not_fit_is_named(damage: str) -> None:
    weights = numpy_weights(TorchUNet.from_config(SD15))
    key = "mid_block.resnets.0.conv1.weight"
    if damage == "missing":
        del weights[key]
    elif damage == "superfluous":
        key = "mid_block.extra.weight"
        weights[key] = np.zeros(1, np.float32)
    else:
        x = weights[key]
        weights[key] = {"shape": x[:3], "flat": x.ravel(), "number": x[0, 0, 0, 0]}[damage]
    with pytest.raises(UserError, match=rf"folder: weight {key} is") as error:
        from_torch(weights, abstract(UNet2DConditionModel, SD15), "folder")
    assert "\n" not in str(error.value)


def test_folders_round_trip_through_diffusers(tmp_path: Path) -> None:
    theirs = randomise(TorchUNet.from_config(SD15))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(UNet2DConditionModel, tmp_path / "theirs")
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(nnx.state(ours)))
    save_model(ours, tmp_path / "ours")
    again = numpy_weights(TorchUNet.from_pretrained(tmp_path / "ours"))
    assert all(np.array_equal(again[key], w) for key, w in numpy_weights(theirs).items())


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    TorchUNet.from_config(SD15).save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="diffusion_pytorch_model.safetensors: not a whole safetensors file"):
        load_model(UNet2DConditionModel, tmp_path)
