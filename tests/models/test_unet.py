"""The UNet against diffusers', for every block type of SD1.5 and SDXL."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel as TorchUNet
from flax import nnx

from hgdpo_jax.errors import UserError
from hgdpo_jax.models.convert import abstract, from_torch
from hgdpo_jax.models.unet import UNet2DConditionModel
from tests.models.parity import numpy_weights, ported, randomise, relative_error
from tests.rounding import NETWORK

SD15 = dict(
    sample_size=16,
    block_out_channels=(32, 64, 64, 64),
    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    cross_attention_dim=24,
    attention_head_dim=8,
    norm_num_groups=8,
)
SDXL = dict(
    sample_size=16,
    block_out_channels=(32, 64, 96),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=24,
    attention_head_dim=(2, 4, 6),
    transformer_layers_per_block=(1, 2, 3),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=6 * 8 + 20,
    norm_num_groups=8,
)


def inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return (
        rng.standard_normal((2, 16, 16, 4), np.float32),
        np.array([3, 987], np.int32),
        rng.standard_normal((2, 7, 24), np.float32),
    )


@pytest.mark.parametrize("texts", [1, 2])
@pytest.mark.parametrize("config", [SD15, SDXL], ids=["sd15", "sdxl"])
def test_the_unet_is_diffusers_unet(config: dict, texts: int) -> None:
    """Two texts of a sample are two samples."""
    theirs = randomise(TorchUNet(**config))
    ours = ported(UNet2DConditionModel, dict(theirs.config), theirs)
    (x, t), rows, rng = inputs()[:2], 2 * texts, np.random.default_rng(1)
    context, pooled = rng.standard_normal((rows, 7, 24), np.float32), rng.standard_normal((rows, 20), np.float32)
    added = {"text_embeds": pooled, "time_ids": rng.integers(0, 512, (rows, 6)).astype(np.float32)}
    with torch.no_grad():
        expected = theirs(
            torch.tensor(x.transpose(0, 3, 1, 2).repeat(texts, axis=0)),
            torch.tensor(t.repeat(texts)),
            torch.tensor(context),
            added_cond_kwargs={k: torch.tensor(v) for k, v in added.items()},
        ).sample
    found = nnx.jit(lambda m, *a: m(*a))(ours, x, t, context, added)
    assert relative_error(found, expected) <= NETWORK


def test_bfloat16_compute_returns_float32_close_to_float32_compute() -> None:
    one_level = {"block_out_channels": (32,), "down_block_types": ("CrossAttnDownBlock2D",)}
    theirs = randomise(TorchUNet(**SD15 | one_level | {"up_block_types": ("CrossAttnUpBlock2D",)}))
    models = [abstract(UNet2DConditionModel, dict(theirs.config), dtype) for dtype in (jnp.float32, jnp.bfloat16)]
    for model in models:
        from_torch(numpy_weights(theirs), model)
    a, b = (nnx.jit(lambda m, *args: m(*args))(model, *inputs()) for model in models)
    assert b.dtype == jnp.float32
    assert 0 < float(jnp.abs(a - b).max() / jnp.abs(a).max()) < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_fn": "gelu"}, "act_fn='gelu'"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
        ({"down_block_types": ("AttnDownBlock2D",) * 4}, "AttnDownBlock2D"),
        ({"attention_head_dim": (8, 8)}, "attention_head_dim"),
    ],
)
def test_a_config_value_that_is_not_implemented_is_named(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        nnx.eval_shape(lambda: UNet2DConditionModel(SD15 | change, rngs=nnx.Rngs(0)))
