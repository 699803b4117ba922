"""The UNet against diffusers', for every block type of SD1.5 and SDXL."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel as TorchUNet
from flax import nnx

from hgdpo_jax.models.convert import abstract, from_torch
from hgdpo_jax.models.layers import Layers
from hgdpo_jax.models.unet import Block, UNet2DConditionModel
from hgdpo_jax.run.errors import UserError
from tests import tiny
from tests.models.parity import numpy_weights, ported, randomise, relative_error
from tests.rounding import GRADIENT, NETWORK, assert_close

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


def diffusers_unet(config: dict) -> tuple[TorchUNet, UNet2DConditionModel]:
    """A random UNet of diffusers, and ours with its weights."""
    theirs = randomise(TorchUNet.from_config(config))
    return theirs, ported(UNet2DConditionModel, dict(theirs.config), theirs)


@pytest.mark.parametrize("config", [tiny.TINY_UNET, tiny.TINY_XL], ids=["sd15", "sdxl"])
def test_the_unet_is_diffusers_unet(config: dict) -> None:
    """Two texts of a sample are two samples. bfloat16 gives float32 that is near."""
    theirs, ours = diffusers_unet(config)
    rng, width = np.random.default_rng(1), config["cross_attention_dim"]
    x, t = rng.standard_normal((2, 4, 4, 8), np.float32), np.array([3, 987], np.int32)
    context, pooled = rng.standard_normal((4, 7, width), np.float32), rng.standard_normal((4, 20), np.float32)
    added = {"text_embeds": pooled, "time_ids": rng.integers(0, 512, (4, 6)).astype(np.float32)}
    with torch.no_grad():
        expected = theirs(
            torch.tensor(x.transpose(0, 3, 1, 2).repeat(2, axis=0)),
            torch.tensor(t.repeat(2)),
            torch.tensor(context),
            added_cond_kwargs={k: torch.tensor(v) for k, v in added.items()},
        ).sample
    run = nnx.jit(lambda m, *a: m(*a))
    assert relative_error(run(ours, x, t, context, added), expected) <= NETWORK
    if config is tiny.TINY_UNET:
        half = abstract(UNet2DConditionModel, dict(theirs.config), jnp.bfloat16)
        from_torch(numpy_weights(theirs), half)
        found = run(half, x, t, context, added)
        assert found.dtype == jnp.float32 and 1e-4 < relative_error(found, expected) < 0.1


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


def test_separate_skips_change_no_result_and_no_gradient() -> None:
    """A group of eight channels has four of x and four of what lies beside it."""
    channels = [(12 + 20, 8), (8 + 8, 16)]  # of the second the sum is the width: no convolution around it
    block = Block(channels, None, None, 16, Layers(nnx.Rngs(0), jnp.float32, groups=4))
    block.checkpointing = "blocks"
    rng = np.random.default_rng(0)
    x, first, second, temb, towards = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((2, 8, 8, 12), (2, 8, 8, 20), (2, 8, 8, 8), (2, 16), (2, 8, 8, 16))
    )

    def run(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = block.layer(1, block.layer(0, x, temb, {}, first), temb, {}, second)
        return (out * towards).sum(), out

    found, counts = [], []
    for block.separate_skips in (False, True):
        gradient = jax.jit(jax.grad(run, has_aux=True))
        found.append(gradient(x))
        counts.append(gradient.lower(x).compile().cost_analysis()["flops"])
    (gradient, out), (gradient_apart, out_apart) = found
    assert_close(out_apart, out, NETWORK)
    assert_close(gradient_apart, gradient, GRADIENT)
    assert counts[1] < 0.9 * counts[0]  # of the gradient beside x nothing is left


def test_checkpointing_and_separate_skips_are_switched_on_in_every_block() -> None:
    one_level = {"block_out_channels": [8], "down_block_types": ["CrossAttnDownBlock2D"]}
    model = abstract(UNet2DConditionModel, tiny.TINY_UNET | one_level | {"up_block_types": ["CrossAttnUpBlock2D"]})

    def program() -> str:
        graph, weights = nnx.split(model)
        shapes = jnp.zeros((2, 4, 4, 8)), jnp.zeros(2, jnp.int32), jnp.zeros((2, 7, 8))
        return str(jax.make_jaxpr(lambda weights, *inputs: nnx.merge(graph, weights)(*inputs))(weights, *shapes))

    resnets = sum(len(block.resnets) for block in (*model.down_blocks, model.mid_block, *model.up_blocks))
    plain, transformers = program(), len(model.transformer_blocks())
    counts = {}
    for policy in ("blocks", "everything", "none"):
        model.checkpoint(policy)
        counts[policy] = program().count("checkpoint[") + program().count("remat2[")
    assert counts["none"] == 0 and counts["blocks"] == resnets + transformers
    assert counts["everything"] > counts["blocks"]
    model.share_skips()
    more = program().count("conv_general_dilated[") - plain.count("conv_general_dilated[")
    skips = sum(len(block.resnets) for block in model.up_blocks)
    assert more >= skips > 0
