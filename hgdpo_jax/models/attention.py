"""Attention blocks of the UNet and the VAE, named as in diffusers. `b n d` are batch, tokens, width."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from hgdpo_jax.models.attend import attend
from hgdpo_jax.models.layers import Layers, in_rows, platform
from hgdpo_jax.models.lora import fused_linear
from hgdpo_jax.models.resnet import checkpointed
from hgdpo_jax.run.errors import UserError

# Keys and values as products read them: a processor would otherwise transpose them in each step of a sampler.
Pair = tuple[Float[Array, "_ heads d_head _"], Float[Array, "_ heads _ d_head"]]
# What cross-attention looks up: name of a transformer block of the UNet → pairs, of sizes of their own. Each
# pair is attended to by itself, and the results are added.
Memory = Mapping[str, Sequence[tuple[Float[Array, "_ _ _ _"], Float[Array, "_ _ _ _"]]]]


def as_pair(
    k: Float[Array, "b m heads d"], v: Float[Array, "b m heads d"]
) -> tuple[Float[Array, "b heads d m"], Float[Array, "b heads m d"]]:
    """Keys and values as products read them."""
    return k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)


class Passthrough(nnx.Module):
    """Holds the place of a Dropout in a list, so that indices stay upstream's."""

    def __call__(self, x: Array) -> Array:
        return x


class Attention(nnx.Module):
    """Multi-head attention over the tokens themselves, or over the keys and values of a context."""

    def __init__(self, width: int, context_width: int, heads: int, make: Layers, bias: bool = False) -> None:
        if width % heads:
            raise UserError(f"UNet config attention_head_dim={heads}: does not divide the width {width}")
        self.heads = heads
        self.sharding: NamedSharding | None = None
        self.to_q = make.linear(width, width, bias)
        self.to_k = make.linear(context_width, width, bias)
        self.to_v = make.linear(context_width, width, bias)
        self.to_out = nnx.List([make.linear(width, width), Passthrough()])

    def split_heads(self, x: Float[Array, "b n d"]) -> Float[Array, "b n heads d_head"]:
        return x.reshape(*x.shape[:2], self.heads, -1)

    def keys_values(self, context: Float[Array, "b m e"]) -> Pair:
        k, v = fused_linear([self.to_k, self.to_v], context, platform(self.sharding))
        return as_pair(self.split_heads(k), self.split_heads(v))

    def __call__(self, x: Float[Array, "b n d"], pairs: Sequence[Pair] | None = None) -> Float[Array, "b n d"]:
        """Attention over x, or the sum of attention over each (keys, values); projected."""
        if pairs is None:
            projected = fused_linear([self.to_q, self.to_k, self.to_v], x, platform(self.sharding))
            q, k, v = map(self.split_heads, projected)
            unpacked = [(k, v)]
        else:
            q = self.split_heads(self.to_q(x))
            unpacked = [(k.transpose(0, 3, 1, 2), v.swapaxes(1, 2)) for k, v in pairs]  # back from as_pair
        out = jnp.asarray(sum(attend(q, k, v, self.sharding) for k, v in unpacked))
        return self.to_out[0](out.reshape(x.shape))


def set_sharding(network: nnx.Module, sharding: NamedSharding) -> None:
    """From now on a network's attention runs where its inputs lie, and its convolutions and products as is best there.

    Args:
        network: changed in place.
        sharding: that of queries, keys and values [b n heads d_head]; its devices may be described ones.
    """
    for _, module in nnx.iter_modules(network):
        if hasattr(module, "sharding"):
            module.sharding = sharding


class GEGLU(nnx.Module):
    """a · gelu(b) of one projection, with the exact (erf) GELU."""

    def __init__(self, width: int, hidden: int, make: Layers) -> None:
        self.proj = make.linear(width, 2 * hidden)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n f"]:
        """The second half of the projection gates the first."""
        value, gate = jnp.split(self.proj(x), 2, axis=-1)
        return value * jax.nn.gelu(gate, approximate=False)


class FeedForward(nnx.Module):
    """GEGLU to four times the width and back."""

    def __init__(self, width: int, make: Layers) -> None:
        self.net = nnx.List([GEGLU(width, 4 * width, make), Passthrough(), make.linear(4 * width, width)])

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return self.net[2](self.net[0](x))


class BasicTransformerBlock(nnx.Module):
    """Self-attention, cross-attention, feed-forward, each after a LayerNorm and added to its input.

    `name` is its path in the UNet, and its key in a :data:`Memory`.
    """

    def __init__(self, width: int, context_width: int, heads: int, make: Layers) -> None:
        self.name = ""
        self.norm1 = make.layer_norm(width)
        self.attn1 = Attention(width, width, heads, make)
        self.norm2 = make.layer_norm(width)
        self.attn2 = Attention(width, context_width, heads, make)
        self.norm3 = make.layer_norm(width)
        self.ff = FeedForward(width, make)

    def __call__(self, x: Float[Array, "b n d"], memory: Memory) -> Float[Array, "b2 n d"]:
        """`memory` holds the text's keys and values, of b rows or a multiple."""
        pairs = memory[self.name]
        x = in_rows(x + self.attn1(self.norm1(x)), len(pairs[0][0]))
        x = x + self.attn2(self.norm2(x), pairs)
        return x + self.ff(self.norm3(x))


class TransformerConfig(NamedTuple):
    """The transformer of one level of the UNet: width of the text, heads, depth; `use_linear` projects with nnx.Linear
    instead of a 1x1 convolution."""

    context_width: int
    heads: int
    layers: int
    use_linear: bool


class Transformer2DModel(nnx.Module):
    """Transformer blocks over the pixels of a feature map, between two projections, plus the input."""

    def __init__(self, channels: int, config: TransformerConfig, make: Layers) -> None:
        def project() -> nnx.Module:
            return make.linear(channels, channels) if config.use_linear else make.conv(channels, channels, 1)

        def block() -> BasicTransformerBlock:
            return BasicTransformerBlock(channels, config.context_width, config.heads, make)

        self.checkpointing = "none"
        self.norm = make.group_norm(channels, 1e-6)
        self.proj_in = project()
        self.transformer_blocks = nnx.List([block() for _ in range(config.layers)])
        self.proj_out = project()

    def __call__(self, x: Float[Array, "b h w c"], memory: Memory) -> Float[Array, "b2 h w c"]:
        """A 1x1 convolution and a Linear are the same on [b, h, w, c], so the order of reshaping does not matter."""
        tokens = self.proj_in(self.norm(x)).reshape(x.shape[0], -1, x.shape[-1])
        for block in self.transformer_blocks:
            tokens = checkpointed(block, self.checkpointing != "none")(tokens, memory)
        return self.proj_out(tokens.reshape(-1, *x.shape[1:])) + in_rows(x, len(tokens))
