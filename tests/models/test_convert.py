"""Conversion is total and bijective."""

from pathlib import Path

import jax
import numpy as np
import pytest
from diffusers import UNet2DConditionModel as TorchUNet
from flax import nnx

from hgdpo_jax.errors import UserError
from hgdpo_jax.models.convert import abstract, from_torch, load_model, save_model, to_torch
from hgdpo_jax.models.unet import UNet2DConditionModel
from tests.models.parity import numpy_weights, randomise
from tests.models.test_unet import SD15, SDXL


@pytest.mark.parametrize("config", [SD15, SDXL], ids=["sd15", "sdxl"])
def test_there_and_back_is_bit_for_bit(config: dict) -> None:
    weights = numpy_weights(randomise(TorchUNet(**config)))
    model = abstract(UNet2DConditionModel, config)
    from_torch(weights, model)
    back = to_torch(model)
    assert back.keys() == weights.keys()
    assert all(back[key].shape == w.shape and np.array_equal(back[key], w) for key, w in weights.items())


@pytest.mark.parametrize("damage", ["missing", "superfluous", "shape"])
def test_a_weight_that_does_not_fit_is_named(damage: str) -> None:
    weights = numpy_weights(TorchUNet(**SD15))
    key = "mid_block.resnets.0.conv1.weight"
    if damage == "missing":
        del weights[key]
    elif damage == "superfluous":
        key = "mid_block.extra.weight"
        weights[key] = np.zeros(1, np.float32)
    else:
        weights[key] = weights[key][:3]
    with pytest.raises(UserError, match=rf"folder: weight {key} is") as error:
        from_torch(weights, abstract(UNet2DConditionModel, SD15), "folder")
    assert "\n" not in str(error.value)


def test_folders_round_trip_through_diffusers(tmp_path: Path) -> None:
    theirs = randomise(TorchUNet(**SD15))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(UNet2DConditionModel, tmp_path / "theirs")
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(nnx.state(ours)))
    save_model(ours, tmp_path / "ours")
    again = numpy_weights(TorchUNet.from_pretrained(tmp_path / "ours"))
    assert all(np.array_equal(again[key], w) for key, w in numpy_weights(theirs).items())


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    TorchUNet(**SD15).save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="diffusion_pytorch_model.safetensors: not a whole safetensors file"):
        load_model(UNet2DConditionModel, tmp_path)
