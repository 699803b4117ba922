"""FLUX.2's files under the names of other programs: single files, and LoRA in each layout, against diffusers."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
from flax import nnx
from safetensors.numpy import save_file

from hgdpo_jax.models import flux2_original, layouts
from hgdpo_jax.models.architectures import alone
from hgdpo_jax.models.convert import abstract, shapes, to_torch
from hgdpo_jax.models.flux2 import Flux2Transformer2DModel
from hgdpo_jax.models.ldm import TranslatedWeights, to_single_file
from hgdpo_jax.models.lora import add_lora, lora_layers, to_peft
from hgdpo_jax.models.merged import LoRAFile
from hgdpo_jax.models.weights import Weights, write_weights
from hgdpo_jax.run.errors import UserError
from tests import klein, tiny
from tests.rounding import EPS

CONFIG = klein.TRANSFORMER
KLEIN = layouts.klein(CONFIG)
RANK, ALPHA = 3, 1.5


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    """Of a transformer, under diffusers' names."""
    return to_torch(tiny.random_model(Flux2Transformer2DModel, CONFIG, 0))


def original(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return to_single_file({"transformer": weights}, {"transformer": CONFIG}, KLEIN.parts)


def test_the_original_file_is_that_which_diffusers_converts_bit_for_bit(weights: dict[str, np.ndarray]) -> None:
    file = original(weights)
    found = convert_flux2_transformer_checkpoint_to_diffusers({key: torch.tensor(x) for key, x in file.items()})
    assert found.keys() == weights.keys() and len(file) == len(weights) - 4  # two streams of a block, three in one each
    assert all(np.array_equal(found[key].numpy(), x) for key, x in weights.items())
    assert flux2_original.MARK in file


@pytest.mark.parametrize("prefix", flux2_original.PREFIXES)
def test_the_original_file_is_read_back_bit_for_bit(
    prefix: str, weights: dict[str, np.ndarray], tmp_path: Path
) -> None:
    named = {f"{prefix}{key}": x for key, x in original(weights).items()}
    saved = {key.replace("_norm.scale", "_norm.weight"): x for key, x in named.items()}  # as ComfyUI writes it
    for number, tensors in enumerate((named, saved)):
        write_weights(tmp_path / f"{number}.safetensors", tensors, np.float32)
        file = Weights(tmp_path / f"{number}.safetensors")
        name, (under, translate) = alone(file) or ("", ("", flux2_original.transformer_part))
        found = TranslatedWeights(file, under, translate, weights, CONFIG)
        assert (name, under) == ("transformer", prefix) and found.keys() == weights.keys()
        assert all(np.array_equal(found[key], x) for key, x in weights.items())


@pytest.fixture(scope="module")
def taught() -> nnx.Module:
    """A transformer whose LoRA does something."""
    model, rng = tiny.random_model(Flux2Transformer2DModel, CONFIG, 0), np.random.default_rng(1)
    add_lora(model, RANK, ALPHA, nnx.Rngs(0), ("attention", "feed_forward"))
    for layer in lora_layers(model).values():
        layer.lora_B[...] = jnp.asarray(rng.standard_normal(layer.lora_B.shape), jnp.float32)
    return model


def as_comfy(kohya: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Random factors under the names of ComfyUI and ai-toolkit, for each layer that kohya's file has."""
    rng, found = np.random.default_rng(seed), {}
    names = {f"lora_unet_{where.key}".replace(".", "_"): where.key
             for where in (flux2_original.module(key.removesuffix(".weight"), CONFIG)
                           for key in shapes(abstract(Flux2Transformer2DModel, CONFIG)))}  # fmt: skip
    for key, x in kohya.items():
        layer, _, side = key.partition(".")
        if side != "alpha":
            own = (RANK, x.shape[1]) if "down" in side else (x.shape[0], RANK)
            factor = side.replace("lora_down", "lora_A").replace("lora_up", "lora_B")
            found[f"diffusion_model.{names[layer]}.{factor}"] = rng.standard_normal(own, np.float32)
    return found


def as_trained_by_kohya(kohya: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Random factors in their place: q, k and v share all of the rank."""
    rng = np.random.default_rng(seed)
    return {key: x if key.endswith("alpha") else rng.standard_normal(x.shape, np.float32) for key, x in kohya.items()}


@pytest.mark.parametrize("kind", ["diffusers", "kohya", "kohya's own", "ComfyUI", "ComfyUI, diffusers' names"])
def test_a_lora_of_each_layout_is_merged_as_diffusers_does(kind: str, taught: nnx.Module, tmp_path: Path) -> None:
    kohya, peft = (KLEIN.lora_weights({"transformer": taught}, name) for name in ("kohya", "peft"))
    file = {
        "diffusers": peft,
        "kohya": kohya,
        "kohya's own": as_trained_by_kohya(kohya, 2),
        "ComfyUI": as_comfy(kohya, 3),
        "ComfyUI, diffusers' names": to_peft(taught, "diffusion_model"),
    }[kind]
    save_file(file, tmp_path / "lora.safetensors")
    lora = LoRAFile(tmp_path / "lora.safetensors", {"transformer": (CONFIG, shapes(taught))})
    base = to_torch(taught)
    found = lora.into("transformer", base)

    theirs = Flux2KleinPipeline.lora_state_dict(str(tmp_path), weight_name="lora.safetensors")
    changed = {key.removesuffix(".lora_A.weight") for key in theirs if key.endswith(".lora_A.weight")}
    assert changed == {f"transformer.{path}" for path in lora_layers(taught)}
    for key, before in base.items():
        name, change = f"transformer.{key.removesuffix('.weight')}", 0.0
        if name in changed:
            change = theirs[f"{name}.lora_B.weight"].numpy() @ theirs[f"{name}.lora_A.weight"].numpy()
            assert np.abs(change).max() > 0.1
        np.testing.assert_allclose(found[key], before + change, rtol=0, atol=64 * EPS, err_msg=key)


def test_query_key_and_value_are_one_layer_of_three_times_rank_and_alpha(taught: nnx.Module) -> None:
    kohya = KLEIN.lora_weights({"transformer": taught}, "kohya")
    at = "lora_unet_double_blocks_0_txt_attn_qkv"
    down, up = (kohya[f"{at}.lora_{side}.weight"] for side in ("down", "up"))
    assert down.shape == (3 * RANK, 32) and up.shape == (96, 3 * RANK) and kohya[f"{at}.alpha"] == 3 * ALPHA
    assert kohya["lora_unet_single_blocks_1_linear1.alpha"] == ALPHA
    on_diagonal = np.kron(np.eye(3), np.ones((32, RANK)))
    assert np.array_equal(up != 0, on_diagonal != 0)


@pytest.mark.parametrize("name", ["diffusion_model.final_layer.adaLN_modulation.1.lora_{}.weight",
                                  "lora_unet_final_layer_adaLN_modulation_1.lora_{}.weight"])  # fmt: skip
def test_a_lora_whose_halves_programs_read_differently_is_refused(name: str, tmp_path: Path) -> None:
    a, b = ("down", "up") if "unet" in name else ("A", "B")
    file = {name.format(a): np.ones((1, 32), np.float32), name.format(b): np.ones((64, 1), np.float32)}
    save_file(file, tmp_path / "lora.safetensors")
    models: Any = {"transformer": (CONFIG, shapes(abstract(Flux2Transformer2DModel, CONFIG)))}
    with pytest.raises(UserError, match=r"programs disagree which of its halves is the scale; expected a LoRA without"):
        LoRAFile(tmp_path / "lora.safetensors", models)
