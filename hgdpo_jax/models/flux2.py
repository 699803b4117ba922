"""The transformer of FLUX.2-klein by Black Forest Labs, driven by the config.json that diffusers writes.

It predicts the velocity of a rectified flow (Liu et al. 2022) from latents x_σ = (1-σ) x₀ + σ ε. Text and image are
tokens, in this order and without a mask; double blocks have weights for each of the two, single blocks for both. What
σ does to a block is computed once for all blocks of a kind.

Legend: `b n d` are batch, tokens, width; `m` is three or six times the width.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from hgdpo_jax.models.attend import attend, fitting
from hgdpo_jax.models.attention import Passthrough
from hgdpo_jax.models.layers import Layers, in_rows, platform
from hgdpo_jax.models.lora import fused_linear
from hgdpo_jax.models.model_config import ModelConfig, check_only
from hgdpo_jax.models.resnet import checkpointed
from hgdpo_jax.models.unet import TimestepEmbedding, sinusoidal
from hgdpo_jax.run.errors import UserError

# What diffusers takes for keys that config.json leaves out.
_DEFAULTS: dict[str, Any] = {"patch_size": 1, "in_channels": 128, "out_channels": None, "num_layers": 8}
_DEFAULTS |= {"num_single_layers": 48, "attention_head_dim": 128, "num_attention_heads": 48, "mlp_ratio": 3.0}
_DEFAULTS |= {"joint_attention_dim": 15360, "timestep_guidance_channels": 256, "axes_dims_rope": (32, 32, 32, 32)}
_DEFAULTS |= {"rope_theta": 2000, "eps": 1e-6, "guidance_embeds": True}
_AXES = 4  # time, row, column, place in the text

# Cosine and sine of the angle by which each channel of a head is turned, for each of all tokens.
Rotation = tuple[Float[np.ndarray, "tokens d_head"], Float[np.ndarray, "tokens d_head"]]


class Sizes(NamedTuple):
    """What the blocks are made of: `width` of a token, `hidden` units of a feed-forward part, eps of all norms."""

    width: int
    heads: int
    hidden: int
    eps: float


def rotation(text: int, height: int, width: int, axes: Sequence[int], theta: float) -> Rotation:
    """Rotary position embedding (Su et al. 2021) of `text` tokens and then of the pixels of a latent, row by row.

    A token has four positions: (0, 0, 0, i) in a text, (0, y, x, 0) in a latent. Each turns its own pairs of
    neighbouring channels, the k-th by position · theta^(-2k / channels).

    Args:
        text, height, width: numbers of tokens, rows, columns.
        axes: channels of each position; together a head's.
        theta: of the lowest frequency.
    """
    positions = np.zeros((text + height * width, _AXES))
    positions[:text, 3] = np.arange(text)
    positions[text:, 1:3] = np.indices((height, width)).reshape(2, -1).T
    frequencies = [theta ** -(np.arange(0, channels, 2) / channels) for channels in axes]
    angles = np.concatenate([positions[:, [axis]] * own for axis, own in enumerate(frequencies)], 1).repeat(2, axis=1)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotated(x: Float[Array, "b tokens heads d_head"], by: Rotation) -> Float[Array, "b tokens heads d_head"]:
    """Each pair of neighbouring channels (a, c) becomes (a cos - c sin, c cos + a sin), in float32."""
    cos, sin = (jnp.asarray(table)[:, None] for table in by)
    wide, is_first = x.astype(jnp.float32), jnp.arange(x.shape[-1]) % 2 == 0
    # Shifts, and not an axis of pairs: TPUs would fill its two numbers up to 128.
    other = jnp.where(is_first, -jnp.roll(wide, -1, -1), jnp.roll(wide, 1, -1))
    return (wide * cos + other * sin).astype(x.dtype)


def whole(x: Float[Array, "b *n"], sharding: NamedSharding | None) -> Float[Array, "b *n"]:
    """x, of which each device holds its rows whole: `tensor` splits heads and hidden units, no token.

    What goes into a product and what comes out of it has to say so, else the compiler may split the width as well: see
    :func:`hgdpo_jax.devices.sharding.row_axes` for what XLA may then do.

    Args:
        x: the input or output of a product, or a gradient's.
        sharding: as for :func:`hgdpo_jax.models.attend.attend`.
    """
    if sharding is None or sharding.mesh.size == 1:
        return x
    rows = NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[0]))
    return jax.lax.with_sharding_constraint(x, fitting(rows, x.shape))


def swiglu(x: Float[Array, "b n f"]) -> Float[Array, "b n h"]:
    """SiLU of the first half times the second (Shazeer 2020)."""
    gate, value = jnp.split(x, 2, axis=-1)
    return jax.nn.silu(gate) * value


def _split_heads(x: Float[Array, "b n d"], heads: int) -> Float[Array, "b n heads d_head"]:
    return x.reshape(*x.shape[:2], heads, -1)


class Modulation(nnx.Module):
    """Shift, scale and gate of the parts of a block, from the time embedding: `triples` of them."""

    sharding: NamedSharding | None = None

    def __init__(self, width: int, triples: int, make: Layers) -> None:
        self.linear = make.linear(width, 3 * triples * width, bias=False)

    def __call__(self, temb: Float[Array, "b d"]) -> Float[Array, "b 1 m"]:
        return whole(self.linear(jax.nn.silu(temb)), self.sharding)[:, None]


class AdaLayerNormContinuous(nnx.Module):
    """LayerNorm, scaled and shifted as the time embedding says."""

    sharding: NamedSharding | None = None

    def __init__(self, width: int, eps: float, make: Layers) -> None:
        self.linear = make.linear(width, 2 * width, bias=False)
        self.norm = make.layer_norm(width, eps, affine=False)

    def __call__(self, x: Float[Array, "b n d"], temb: Float[Array, "b d"]) -> Float[Array, "b n d"]:
        """The scale comes first, other than in the blocks."""
        scale, shift = jnp.split(whole(self.linear(jax.nn.silu(temb)), self.sharding)[:, None], 2, axis=-1)
        return whole(self.norm(x) * (1 + scale) + shift, self.sharding)


class Flux2FeedForward(nnx.Module):
    """SwiGLU between two linear layers."""

    def __init__(self, sizes: Sizes, make: Layers) -> None:
        self.linear_in = make.linear(sizes.width, 2 * sizes.hidden, bias=False)
        self.linear_out = make.linear(sizes.hidden, sizes.width, bias=False)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return self.linear_out(swiglu(self.linear_in(x)))


class Flux2Attention(nnx.Module):
    """Attention over text and image together; each has its own projections, and its own norms of queries and keys."""

    def __init__(self, sizes: Sizes, make: Layers) -> None:
        self.heads = sizes.heads
        self.sharding: NamedSharding | None = None

        def project() -> nnx.Linear:
            return make.linear(sizes.width, sizes.width, bias=False)

        def norm() -> nnx.RMSNorm:
            return make.rms_norm(sizes.width // sizes.heads, sizes.eps)

        self.to_q, self.to_k, self.to_v, self.norm_q, self.norm_k = project(), project(), project(), norm(), norm()
        self.to_out = nnx.List([project(), Passthrough()])
        self.add_q_proj, self.add_k_proj, self.add_v_proj = project(), project(), project()
        self.norm_added_q, self.norm_added_k, self.to_add_out = norm(), norm(), project()

    def _heads(self, x: Float[Array, "b n d"], layers: Sequence[nnx.Linear], norms: Sequence[Callable]) -> list[Array]:
        """Queries and keys, normalised, and values [b n heads d_head]."""
        q, k, v = (_split_heads(y, self.heads) for y in fused_linear(layers, x, platform(self.sharding)))
        norm_q, norm_k = norms
        return [norm_q(q), norm_k(k), v]

    def __call__(
        self, text: Float[Array, "b s d"], image: Float[Array, "b n d"], by: Rotation
    ) -> tuple[Float[Array, "b s d"], Float[Array, "b n d"]]:
        """What is added to text and image."""
        of_text = self._heads(
            text, [self.add_q_proj, self.add_k_proj, self.add_v_proj], [self.norm_added_q, self.norm_added_k]
        )
        of_image = self._heads(image, [self.to_q, self.to_k, self.to_v], [self.norm_q, self.norm_k])
        q, k, v = (jnp.concatenate(both, 1) for both in zip(of_text, of_image, strict=True))
        out = attend(rotated(q, by), rotated(k, by), v, self.sharding).reshape(len(q), q.shape[1], -1)
        text, image = jnp.split(out, [text.shape[1]], axis=1)
        return self.to_add_out(text), self.to_out[0](image)


class _Block(nnx.Module):
    """What double and single blocks have in common."""

    sharding: NamedSharding | None = None

    def modulated(self, norm: nnx.LayerNorm, x: Array, shift: Array, scale: Array) -> Array:
        """The input of a part of the block."""
        return whole((1 + scale) * norm(x) + shift, self.sharding)

    def gated(self, gate: Array, more: Array) -> Array:
        """What is added to the input."""
        return gate * whole(more, self.sharding)


class Flux2TransformerBlock(_Block):
    """A double block: attention over both, then a feed-forward part for each of text and image."""

    def __init__(self, sizes: Sizes, make: Layers) -> None:
        def norm() -> nnx.LayerNorm:
            return make.layer_norm(sizes.width, sizes.eps, affine=False)

        self.norm1, self.norm1_context, self.norm2, self.norm2_context = norm(), norm(), norm(), norm()
        self.attn = Flux2Attention(sizes, make)
        self.ff, self.ff_context = Flux2FeedForward(sizes, make), Flux2FeedForward(sizes, make)

    def __call__(
        self,
        x: tuple[Float[Array, "b s d"], Float[Array, "b n d"]],
        modulation: tuple[Float[Array, "b 1 m"], Float[Array, "b 1 m"]],
        by: Rotation,
    ) -> tuple[Float[Array, "b s d"], Float[Array, "b n d"]]:
        """Text and image after the block; `x` and `modulation` are of text and image too."""
        text, image = x
        (shift_t, scale_t, gate_t, *ff_t), (shift_i, scale_i, gate_i, *ff_i) = (
            jnp.split(both, 6, axis=-1) for both in modulation
        )
        more_text, more_image = self.attn(
            self.modulated(self.norm1_context, text, shift_t, scale_t),
            self.modulated(self.norm1, image, shift_i, scale_i),
            by,
        )
        text, image = text + self.gated(gate_t, more_text), image + self.gated(gate_i, more_image)
        (shift_t, scale_t, gate_t), (shift_i, scale_i, gate_i) = ff_t, ff_i
        text += self.gated(gate_t, self.ff_context(self.modulated(self.norm2_context, text, shift_t, scale_t)))
        image += self.gated(gate_i, self.ff(self.modulated(self.norm2, image, shift_i, scale_i)))
        return text, image


class Flux2ParallelSelfAttention(nnx.Module):
    """Attention and a feed-forward part side by side (Dehghani et al. 2023), with one projection in and one out."""

    def __init__(self, sizes: Sizes, make: Layers) -> None:
        self.heads = sizes.heads
        self.sharding: NamedSharding | None = None
        self.to_qkv_mlp_proj = make.linear(sizes.width, 3 * sizes.width + 2 * sizes.hidden, bias=False)
        self.norm_q, self.norm_k = (make.rms_norm(sizes.width // sizes.heads, sizes.eps) for _ in range(2))
        self.to_out = make.linear(sizes.width + sizes.hidden, sizes.width, bias=False)

    def __call__(self, x: Float[Array, "b n d"], by: Rotation) -> Float[Array, "b n d"]:
        width = x.shape[-1]
        *qkv, hidden = jnp.split(self.to_qkv_mlp_proj(x), [width, 2 * width, 3 * width], axis=-1)
        q, k, v = (_split_heads(y, self.heads) for y in qkv)
        out = attend(rotated(self.norm_q(q), by), rotated(self.norm_k(k), by), v, self.sharding)
        return self.to_out(jnp.concatenate([out.reshape(x.shape), swiglu(hidden)], axis=-1))


class Flux2SingleTransformerBlock(_Block):
    """A single block, over all tokens."""

    def __init__(self, sizes: Sizes, make: Layers) -> None:
        self.norm = make.layer_norm(sizes.width, sizes.eps, affine=False)
        self.attn = Flux2ParallelSelfAttention(sizes, make)

    def __call__(
        self, x: Float[Array, "b n d"], modulation: Float[Array, "b 1 m"], by: Rotation
    ) -> Float[Array, "b n d"]:
        shift, scale, gate = jnp.split(modulation, 3, axis=-1)
        return x + self.gated(gate, self.attn(self.modulated(self.norm, x, shift, scale), by))


class TimeEmbedding(nnx.Module):
    """Of σ; diffusers' name for it has room for guidance, which klein does not have."""

    def __init__(self, channels: int, width: int, make: Layers) -> None:
        self.channels = channels
        self.timestep_embedder = TimestepEmbedding(channels, width, make, bias=False)

    def __call__(self, sigma: Float[Array, "b"], dtype: DTypeLike) -> Float[Array, "b d"]:
        """σ stays float32 until it is on the waves: bfloat16 has 1/256 between 0.5 and 1, which is four timesteps."""
        return self.timestep_embedder(sinusoidal(1000 * sigma.astype(jnp.float32), self.channels).astype(dtype))


class Flux2Transformer2DModel(nnx.Module):
    """v_θ(x_σ, σ, c), which is to be ε − x₀.

    Args:
        config: parsed config.json.
        rngs: for the initial weights.
        dtype: compute dtype; parameters are float32.

    Raises:
        UserError: a config value that changes the computation in a way that is not implemented.
    """

    sharding: NamedSharding | None = None

    def __init__(self, config: Mapping[str, Any], *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        values = {**_DEFAULTS, **config}
        only = {"patch_size": (1,), "guidance_embeds": (False,), "out_channels": (None, values["in_channels"])}
        check_only(values, only, "transformer")
        self.config = ModelConfig(config)
        self.dtype = jnp.dtype(dtype)
        make = Layers(rngs, self.dtype)
        heads, head, channels = (values[x] for x in ("num_attention_heads", "attention_head_dim", "in_channels"))
        self.axes, self.theta = tuple(values["axes_dims_rope"]), float(values["rope_theta"])
        if len(self.axes) != _AXES or sum(self.axes) != head or any(size % 2 for size in self.axes):
            raise UserError(f"transformer config axes_dims_rope={[*self.axes]}: expects {_AXES} even numbers, together "
                            f"attention_head_dim={head}")  # fmt: skip
        width, eps = heads * head, float(values["eps"])
        sizes = Sizes(width, heads, int(width * values["mlp_ratio"]), eps)

        self.time_guidance_embed = TimeEmbedding(values["timestep_guidance_channels"], width, make)
        self.double_stream_modulation_img = Modulation(width, 2, make)
        self.double_stream_modulation_txt = Modulation(width, 2, make)
        self.single_stream_modulation = Modulation(width, 1, make)
        self.x_embedder = make.linear(channels, width, bias=False)
        self.context_embedder = make.linear(values["joint_attention_dim"], width, bias=False)
        self.transformer_blocks = nnx.List([Flux2TransformerBlock(sizes, make) for _ in range(values["num_layers"])])
        singles = range(values["num_single_layers"])
        self.single_transformer_blocks = nnx.List([Flux2SingleTransformerBlock(sizes, make) for _ in singles])
        self.norm_out = AdaLayerNormContinuous(width, eps, make)
        # The solver adds up the rounding of the prediction, and this layer is a small one.
        self.proj_out = Layers(rngs, jnp.float32).linear(width, channels, bias=False)
        self.checkpointing = "none"

    @property
    def latent_multiple(self) -> int:
        """Height and width of a latent are multiples of this: any."""
        return 1

    def share_skips(self) -> None:
        """Of a UNet, where only up blocks learn. Raises UserError: there are none."""
        raise UserError("config key train.blocks=up: this model is a transformer without up blocks; expects all")

    def read_text(self, encoder_hidden_states: Float[Array, "n s e"]) -> Float[Array, "n s d"]:
        """Text embeddings as the blocks read them. Sampling computes them once, not in each step."""
        return whole(self.context_embedder(encoder_hidden_states.astype(self.dtype)), self.sharding)

    def checkpoint(self, policy: str) -> None:
        """Gradient checkpointing from now on; it changes memory and time, not the result.

        Args:
            policy: `none` keeps all activations; `blocks` what enters each block, and computes the forward pass twice;
                `everything` what enters each of about √blocks groups of blocks, and computes it three times.
        """
        self.checkpointing = policy

    def _through(self, blocks: Sequence[Callable], x: Any, *given: Any) -> Any:
        """x after some blocks of one kind."""

        def run(some: Sequence[Callable], x: Any) -> Any:
            for block in some:
                x = checkpointed(lambda x, block=block: block(x, *given), self.checkpointing != "none")(x)
            return x

        size = math.isqrt(len(blocks)) if self.checkpointing == "everything" else len(blocks)
        for i in range(0, len(blocks), size):
            x = checkpointed(lambda x, i=i: run(blocks[i : i + size], x), self.checkpointing == "everything")(x)
        return x

    def __call__(
        self,
        sample: Float[Array, "b h w c"],
        sigma: Float[Array, "b"],
        text: Float[Array, "n s d"],
        added_cond: None = None,
    ) -> Float[Array, "n h w c"]:
        """The velocity in float32.

        Args:
            sample: noisy latents of patches, normalised, see :meth:`AutoencoderKLFlux2.to_latents`.
            sigma: share of noise, 0…1.
            text: what :meth:`read_text` made of the text embeddings, of padding too. `n` is a multiple of `b`; n / b
                rows in turn belong to each sample.
            added_cond: of other models.
        """
        (_, height, width, channels), (rows, tokens, _) = sample.shape, text.shape
        temb = in_rows(whole(self.time_guidance_embed(sigma, self.dtype), self.sharding), rows)
        image = self.x_embedder(sample.astype(self.dtype).reshape(len(sample), height * width, channels))
        image = in_rows(whole(image, self.sharding), rows)
        by = rotation(tokens, height, width, self.axes, self.theta)
        modulation = self.double_stream_modulation_txt(temb), self.double_stream_modulation_img(temb)
        both = self._through(self.transformer_blocks, (text, image), modulation, by)
        x = jnp.concatenate(both, axis=1)
        x = self._through(self.single_transformer_blocks, x, self.single_stream_modulation(temb), by)
        out = whole(self.proj_out(self.norm_out(x[:, tokens:], temb)), self.sharding)
        return out.reshape(rows, height, width, channels)
