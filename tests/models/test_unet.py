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
from tests.rounding import NETWORK, assert_close

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


@pytest.mark.parametrize("config", [SD15, SDXL], ids=["sd15", "sdxl"])
def test_the_unet_is_diffusers_unet(config: dict) -> None:
    theirs = randomise(TorchUNet(**config))
    ours = ported(UNet2DConditionModel, dict(theirs.config), theirs)
    x, t, context = inputs()
    rng = np.random.default_rng(1)
    added = {
        "text_embeds": rng.standard_normal((2, 20), np.float32),
        "time_ids": np.array([[64, 48, 0, 8, 64, 64], [512, 512, 0, 0, 512, 512]], np.float32),
    }
    with torch.no_grad():
        expected = theirs(
            torch.tensor(x.transpose(0, 3, 1, 2)),
            torch.tensor(t),
            torch.tensor(context),
            added_cond_kwargs={k: torch.tensor(v) for k, v in added.items()},
        ).sample
    found = nnx.jit(lambda m, *a: m(*a))(ours, x, t, context, added)
    assert relative_error(found, expected) <= NETWORK


@pytest.mark.parametrize("config", [SD15, SDXL], ids=["sd15", "sdxl"])
def test_two_texts_of_a_sample_are_two_samples(config: dict) -> None:
    theirs = randomise(TorchUNet(**config))
    model = ported(UNet2DConditionModel, dict(theirs.config), theirs)
    x, t, _ = inputs()
    rng = np.random.default_rng(1)
    context, pooled = rng.standard_normal((4, 7, 24), np.float32), rng.standard_normal((4, 20), np.float32)
    added = {"text_embeds": pooled, "time_ids": rng.uniform(0, 512, (4, 6)).astype(np.float32)}
    run = nnx.jit(lambda m, *a: m(*a))
    expected = np.asarray(run(model, np.repeat(x, 2, axis=0), np.repeat(t, 2), context, added))
    assert_close(run(model, x, t, context, added), expected, NETWORK)
    assert np.abs(expected[0::2] - expected[1::2]).max() > 0.1 * np.abs(expected).max()


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
