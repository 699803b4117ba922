"""The conditional UNet of Stable Diffusion 1.x, 2.x and XL, driven by the config.json that diffusers writes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from hgdpo_jax.models.attention import BasicTransformerBlock, Memory, Transformer2DModel, TransformerConfig
from hgdpo_jax.models.layers import Layers, in_rows
from hgdpo_jax.models.model_config import ModelConfig, check_only
from hgdpo_jax.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D, checkpointed
from hgdpo_jax.run.errors import UserError

# What changes the computation and is implemented in one way only; an absent key means the first value.
_NONE = """class_embed_type cross_attention_norm encoder_hid_dim encoder_hid_dim_type num_attention_heads
num_class_embeds reverse_transformer_layers_per_block time_cond_proj_dim time_embedding_act_fn time_embedding_dim
timestep_post_act"""
_FALSE = "center_input_sample dual_cross_attention only_cross_attention resnet_skip_time_act"
_ONLY: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(_NONE.split(), (None,)),
    **dict.fromkeys(_FALSE.split(), (False,)),
    **dict.fromkeys(("attention_type", "resnet_time_scale_shift"), ("default",)),
    **dict.fromkeys(("conv_in_kernel", "conv_out_kernel"), (3,)),
    **dict.fromkeys(("downsample_padding", "mid_block_scale_factor", "resnet_out_scale_factor"), (1,)),
    "act_fn": ("silu",),
    "dropout": (0,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "time_embedding_type": ("positional",),
}


def sinusoidal(t: Float[Array, "b"] | Int[Array, "b"], width: int) -> Float[Array, "b width"]:
    """[cos, sin] of t at `width / 2` geometric frequencies from 1 to 1/10000, float32 (Vaswani et al. 2017)."""
    half = width // 2
    frequencies = jnp.exp(-math.log(10_000) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimestepEmbedding(nnx.Module):
    """Two linear layers around a SiLU."""

    def __init__(self, inputs: int, width: int, make: Layers, bias: bool = True) -> None:
        self.linear_1 = make.linear(inputs, width, bias)
        self.linear_2 = make.linear(width, width, bias)

    def __call__(self, x: Float[Array, "b i"]) -> Float[Array, "b d"]:
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


class Block(nnx.Module):
    """A level of the UNet: residual blocks, each followed by attention where the level has any, then a resampling.

    Args:
        channels: (inputs, outputs) of each residual block.
        transformer: that of the level; None if it has no attention.
        resample: "down", "up" or none.
        time_width: of the time embedding.

    Attributes:
        checkpointing: what the gradient keeps, see :meth:`UNet2DConditionModel.checkpoint`.
        separate_skips: see :meth:`UNet2DConditionModel.share_skips`.
    """

    def __init__(
        self,
        channels: Sequence[tuple[int, int]],
        transformer: TransformerConfig | None,
        resample: str | None,
        time_width: int,
        make: Layers,
    ) -> None:
        self.checkpointing, self.separate_skips = "none", False
        self.resnets = nnx.List([ResnetBlock2D(i, o, make, time_width) for i, o in channels])
        outputs = channels[-1][1]
        if transformer is not None:
            self.attentions = nnx.List([Transformer2DModel(outputs, transformer, make) for _ in channels])
        if resample == "down":
            self.downsamplers = nnx.List([Downsample2D(outputs, make)])
        if resample == "up":
            self.upsamplers = nnx.List([Upsample2D(outputs, make)])

    def layer(
        self,
        i: int,
        x: Float[Array, "b h w c"],
        temb: Float[Array, "b2 d"],
        memory: Memory,
        skip: Float[Array, "b h w c2"] | None = None,
    ) -> Float[Array, "b3 h w c3"]:
        """Residual block i, of x and of the `skip` that an up block gets from a down block, and its attention."""
        if skip is not None and not self.separate_skips:
            x, skip = jnp.concatenate([x, skip], axis=-1), None

        def run(x: Array, temb: Array, memory: Memory, skip: Array | None) -> Array:
            x = checkpointed(self.resnets[i], self.checkpointing != "none")(x, temb, skip)
            return self.attentions[i](x, memory) if hasattr(self, "attentions") else x

        return checkpointed(run, self.checkpointing == "everything")(x, temb, memory, skip)


class MidBlock(nnx.Module):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int, transformer: TransformerConfig, time_width: int, make: Layers) -> None:
        self.checkpointing = "none"
        self.resnets = nnx.List([ResnetBlock2D(channels, channels, make, time_width) for _ in range(2)])
        self.attentions = nnx.List([Transformer2DModel(channels, transformer, make)])

    def __call__(
        self, x: Float[Array, "b h w c"], temb: Float[Array, "b2 d"], memory: Memory
    ) -> Float[Array, "b3 h w c"]:
        def run(x: Array, temb: Array, memory: Memory) -> Array:
            first, second = (checkpointed(resnet, self.checkpointing != "none") for resnet in self.resnets)
            return second(self.attentions[0](first(x, temb), memory), temb)

        return checkpointed(run, self.checkpointing == "everything")(x, temb, memory)


class UNet2DConditionModel(nnx.Module):
    """ε_θ(x_t, t, c), or v_θ where the scheduler says so.

    Args:
        config: parsed config.json.
        rngs: for the initial weights.
        dtype: compute dtype; parameters are float32.

    Raises:
        UserError: a config value that changes the computation in a way that is not implemented.
    """

    def __init__(self, config: Mapping[str, Any], *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        check_only(config, _ONLY, "UNet")
        self.config = ModelConfig(config)
        self.dtype = jnp.dtype(dtype)
        make = Layers(rngs, self.dtype, config.get("norm_num_groups", 32), float(config.get("norm_eps", 1e-5)))
        widths: list[int] = list(config["block_out_channels"])
        levels, time_width = len(widths), 4 * widths[0]
        layers = _per_level(config.get("layers_per_block", 2), levels, "layers_per_block")
        transformers = _transformers(config, levels)

        self.conv_in = make.conv(config.get("in_channels", 4), widths[0], 3)
        self.time_embedding = TimestepEmbedding(widths[0], time_width, make)
        self.addition = config.get("addition_embed_type")
        if self.addition == "text_time":
            self.addition_time_width = int(config["addition_time_embed_dim"])
            self.add_embedding = TimestepEmbedding(config["projection_class_embeddings_input_dim"], time_width, make)
        elif self.addition is not None:
            raise UserError(f"UNet config addition_embed_type={self.addition!r}: not supported, only 'text_time' is")

        down, skips, previous = [], [widths[0]], widths[0]
        for level, width in enumerate(widths):
            resample = "down" if level < levels - 1 else None
            channels = [(width if i else previous, width) for i in range(layers[level])]
            attention = _attention(config["down_block_types"][level], "Down", transformers[level])
            down.append(Block(channels, attention, resample, time_width, make))
            skips += [width] * (layers[level] + (resample is not None))
            previous = width
        self.down_blocks = nnx.List(down)
        self.mid_block = MidBlock(widths[-1], transformers[-1], time_width, make)
        up = []
        for i, level in enumerate(reversed(range(levels))):
            width, channels = widths[level], []
            for _ in range(layers[level] + 1):
                channels.append((previous + skips.pop(), width))
                previous = width
            attention = _attention(config["up_block_types"][i], "Up", transformers[level])
            up.append(Block(channels, attention, "up" if level else None, time_width, make))
        self.up_blocks = nnx.List(up)
        self.conv_norm_out = make.group_norm(widths[0])
        # The solver amplifies the rounding of the prediction, and this layer is a small one.
        self.conv_out = replace(make, dtype=jnp.float32).conv(widths[0], config.get("out_channels", 4), 3)
        for name, block in self.transformer_blocks().items():
            block.name = name

    def transformer_blocks(self) -> dict[str, BasicTransformerBlock]:
        """All of them by name, such as `down_blocks.0.attentions.1.transformer_blocks.0`."""
        modules = nnx.iter_modules(self)
        return {".".join(map(str, path)): m for path, m in modules if isinstance(m, BasicTransformerBlock)}

    def read_text(self, encoder_hidden_states: Float[Array, "b s d"]) -> Memory:
        """The text's keys and values in each cross-attention. Sampling computes them once, not in each step."""
        context = encoder_hidden_states.astype(self.dtype)
        return {name: [block.attn2.keys_values(context)] for name, block in self.transformer_blocks().items()}

    @property
    def latent_multiple(self) -> int:
        """Height and width of a latent are multiples of this: each level but one halves them."""
        return 2 ** (len(self.config["block_out_channels"]) - 1)

    def checkpoint(self, policy: str) -> None:
        """Gradient checkpointing from now on; it changes memory and time, not the result.

        Args:
            policy: `none` keeps all activations; `blocks` what enters each residual and each transformer block, and
                computes the forward pass twice; `everything` what enters each layer (a residual block with all its
                transformer blocks), and computes it three times.
        """
        for _, module in nnx.iter_modules(self):
            if hasattr(module, "checkpointing"):
                module.checkpointing = policy

    def share_skips(self) -> None:
        """From now on an up block convolves separately what comes from a down block and what comes from below. Time and
        rounding change, not the result.

        Where only the up blocks of policy and reference differ, they have the first part in common, and no gradient
        goes there. Elsewhere it only makes two convolutions of one.
        """
        for block in self.up_blocks:
            block.separate_skips = True

    def __call__(
        self,
        sample: Float[Array, "b h w c"],
        timesteps: Int[Array, "b"],
        encoder_hidden_states: Float[Array, "n s d"] | Memory,
        added_cond: Mapping[str, Array] | None = None,
    ) -> Float[Array, "n h w c"]:
        """The prediction in float32.

        Args:
            sample: noisy latents; h and w are multiples of 2 to the number of downsamplings.
            timesteps: 0…999.
            encoder_hidden_states: text embeddings, or what :meth:`read_text` made of them. `n` is a multiple of `b`;
                n / b rows in turn belong to each sample, and what comes before the text is computed once for them.
            added_cond: SDXL only: `text_embeds` [n, p] (pooled) and `time_ids` [n, 6] (sizes and crop in pixels).
        """
        dtype, memory = self.dtype, encoder_hidden_states
        if not isinstance(memory, Mapping):
            memory = self.read_text(memory)
        temb = self.time_embedding(sinusoidal(timesteps, self.conv_in.out_features).astype(dtype))
        if self.addition == "text_time":
            if added_cond is None:
                raise UserError("this UNet (SDXL) needs added_cond with text_embeds and time_ids")
            ids = added_cond["time_ids"]
            times = sinusoidal(ids.reshape(-1), self.addition_time_width).reshape(ids.shape[0], -1)
            temb = in_rows(temb, len(ids)) + self.add_embedding(
                jnp.concatenate([added_cond["text_embeds"].astype(dtype), times.astype(dtype)], axis=-1)
            )
        x = in_rows(self.conv_in(sample.astype(dtype)), len(temb))
        skips = [x]
        for block in self.down_blocks:
            for i in range(len(block.resnets)):
                x = block.layer(i, x, temb, memory)
                skips.append(x)
            if hasattr(block, "downsamplers"):
                x = block.downsamplers[0](x)
                skips.append(x)
        x = self.mid_block(x, temb, memory)
        for block in self.up_blocks:
            for i in range(len(block.resnets)):
                x = block.layer(i, x, temb, memory, in_rows(skips.pop(), len(x)))
            if hasattr(block, "upsamplers"):
                x = block.upsamplers[0](x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


def _transformers(config: Mapping[str, Any], levels: int) -> list[TransformerConfig]:
    """The transformer of each level, whether its blocks have attention or not."""
    contexts = _per_level(config["cross_attention_dim"], levels, "cross_attention_dim")
    heads = _per_level(config.get("attention_head_dim", 8), levels, "attention_head_dim")  # so these models call them
    depths = _per_level(config.get("transformer_layers_per_block", 1), levels, "transformer_layers_per_block")
    linear = config.get("use_linear_projection", False)
    return [TransformerConfig(*sizes, linear) for sizes in zip(contexts, heads, depths, strict=True)]


def _attention(block_type: str, side: str, transformer: TransformerConfig) -> TransformerConfig | None:
    """The transformer, if blocks of this type have one."""
    plain, cross = f"{side}Block2D", f"CrossAttn{side}Block2D"
    if block_type not in (plain, cross):
        raise UserError(f"UNet config block type {block_type}: not supported, only {plain} and {cross} are")
    return transformer if block_type == cross else None


def _per_level(value: int | Sequence[int], levels: int, key: str) -> list[int]:
    values = list(value) if isinstance(value, Sequence) else [value] * levels
    if len(values) != levels:
        raise UserError(f"UNet config {key}={value!r}: expects one number or {levels}")
    return values
