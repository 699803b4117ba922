"""The values of a config.json are checked as they are read."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from hgdpo_jax.models.architectures import SD15, SDXL
from hgdpo_jax.models.clip import CLIPTextModel
from hgdpo_jax.models.convert import abstract
from hgdpo_jax.models.model_config import read_config
from hgdpo_jax.models.unet import UNet2DConditionModel
from hgdpo_jax.run.errors import UserError
from tests import tiny


def write(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


KLEIN = {"_class_name": "Flux2Transformer2DModel", "axes_dims_rope": [32] * 4, "eps": 1e-6, "guidance_embeds": False}
KLEIN |= {"joint_attention_dim": 7680, "mlp_ratio": 3.0, "num_single_layers": 20, "out_channels": None, "patch_size": 1}
KLEIN_VAE = {"batch_norm_eps": 1e-4, "batch_norm_momentum": 0.1, "latent_channels": 32, "patch_size": [2, 2]}
KLEIN_VAE |= {"decoder_block_out_channels": None, "force_upcast": True, "sample_size": 1024}


@pytest.mark.parametrize("config", [*SD15.configs.values(), *SDXL.configs.values(), KLEIN, KLEIN_VAE])
def test_published_configs_are_read_as_they_are(config: dict[str, Any], tmp_path: Path) -> None:
    nothing = {"addition_time_embed_dim": None, "num_class_embeds": None, "text_config_dict": None}
    assert read_config(write(tmp_path, config | nothing)) == config | nothing


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("in_channels", "4"), ("in_channels", 0), ("hidden_size", 8.5), ("hidden_size", True), ("vocab_size", 10**30),
        ("num_hidden_layers", 10**6), ("layers_per_block", -1), ("layers_per_block", [2, "2"]),
        ("layers_per_block", []), ("block_out_channels", 320), ("block_out_channels", [320, None]),
        ("down_block_types", "DownBlock2D"),
        ("up_block_types", [3]), ("scaling_factor", "0.18"), ("layer_norm_eps", float("nan")), ("hidden_act", ["gelu"]),
        ("scaling_factor", 0), ("norm_eps", -1.0), ("eos_token_id", 0.5), ("eos_token_id", -1),
        ("axes_dims_rope", 32), ("num_single_layers", 0), ("guidance_embeds", 1), ("batch_norm_eps", 0),
        ("patch_size", []), ("use_linear_projection", "false"), ("architectures", 3), ("vision_config", [1]),
        ("text_config", "x"),
    ],
)  # fmt: skip
def test_a_value_that_no_model_has_is_named(key: str, value: Any, tmp_path: Path) -> None:
    for config in ({key: value}, {"text_config": {key: value}}):
        with pytest.raises(UserError, match=rf"config\.json: {key}=.*; expected") as error:
            read_config(write(tmp_path, config if "_config" not in key else {key: value}))
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


class OfOneSize(nnx.Module):
    """Its size is passed on as it is, where the tests check no type."""

    def __init__(self, config: dict[str, Any], **_: object) -> None:
        self.kernel = nnx.Param(jax.ShapeDtypeStruct((config["size"],), jnp.float32))


@pytest.mark.parametrize(
    ("cls", "config", "message"),
    [
        (UNet2DConditionModel, tiny.ONE_LEVEL | {"norm_num_groups": 3}, "its values make no model"),
        (UNet2DConditionModel, tiny.ONE_LEVEL | {"down_block_types": []}, "its values make no model"),
        (UNet2DConditionModel, tiny.ONE_LEVEL | {"attention_head_dim": 3}, "attention_head_dim=3: does not divide"),
        (CLIPTextModel, tiny.TINY_TEXT | {"num_attention_heads": 3}, "num_attention_heads=3: does not divide"),
        (CLIPTextModel, tiny.TINY_TEXT | {"layer_norm_eps": None}, "its values make no model"),
        (CLIPTextModel, tiny.TINY_TEXT | {"eos_token_id": None}, "its values make no model"),
        (OfOneSize, {"size": None}, "its values make no model .a size is null"),
        (UNet2DConditionModel, tiny.ONE_LEVEL | {"norm_eps": None}, "its values make no model"),
        (UNet2DConditionModel, tiny.TINY_XL | {"addition_time_embed_dim": None}, "its values make no model"),
    ],
)
def test_values_that_do_not_go_together_are_refused(cls: Any, config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        abstract(cls, config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_fn": "gelu"}, "UNet config act_fn='gelu': not supported"),
        ({"norm_num_groups": 3}, "UNet2DConditionModel config: its values make no model"),
        ({"cross_attention_dim": ...}, "has no cross_attention_dim; expected the file of such a model"),
    ],
)
def test_a_refused_config_is_named_once(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    values = {key: value for key, value in (tiny.ONE_LEVEL | change).items() if value is not ...}
    with pytest.raises(UserError, match=f"^{tmp_path / 'config.json'}: {message}"):
        abstract(UNet2DConditionModel, read_config(write(tmp_path, values)))
