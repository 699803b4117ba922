"""Attention blocks of the UNet and the VAE, named as in diffusers. `b n d` are batch, tokens, width."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from hgdpo_jax.models.attend import attend
from hgdpo_jax.models.layers import conv, group_norm, in_rows, layer_norm, linear, platform
from hgdpo_jax.models.lora import fused_linear
from hgdpo_jax.models.resnet import checkpointed

# What cross-attention looks up: for each of the UNet's, by name, its keys and values as :func:`as_read` lays them. More
# than one pair is attended to one by one and the results are added.
Memory = Mapping[str, Sequence[tuple[Array, Array]]]


def as_read(k: Float[Array, "b m heads d"], v: Float[Array, "b m heads d"]) -> tuple[Array, Array]:
    """[b heads d m] and [b heads m d], as products read them: a processor would turn them in each step of a drawing."""
    return k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)


class Passthrough(nnx.Module):
    """Holds the place of a Dropout in a list, so that indices stay upstream's."""

    def __call__(self, x: Array) -> Array:
        """x itself."""
        return x


class Attention(nnx.Module):
    """Multi-head attention over the tokens themselves, or over the keys and values of a context."""

    def __init__(
        self, width: int, context_width: int, heads: int, *, bias: bool, rngs: nnx.Rngs, dtype: jnp.dtype
    ) -> None:
        self.heads = heads
        self.sharding: NamedSharding | None = None
        self.to_q = linear(width, width, use_bias=bias, dtype=dtype, rngs=rngs)
        self.to_k = linear(context_width, width, use_bias=bias, dtype=dtype, rngs=rngs)
        self.to_v = linear(context_width, width, use_bias=bias, dtype=dtype, rngs=rngs)
        self.to_out = nnx.List([linear(width, width, dtype=dtype, rngs=rngs), Passthrough()])

    def split_heads(self, x: Float[Array, "b n d"]) -> Float[Array, "b n heads d_head"]:
        """The width as heads."""
        return x.reshape(*x.shape[:2], self.heads, -1)

    def keys_values(self, context: Float[Array, "b m e"]) -> tuple[Array, Array]:
        """Keys and values of a context, see :data:`Memory`."""
        return as_read(*map(self.split_heads, fused_linear([self.to_k, self.to_v], context, platform(self.sharding))))

    def __call__(
        self, x: Float[Array, "b n d"], pairs: Sequence[tuple[Array, Array]] | None = None
    ) -> Float[Array, "b n d"]:
        """Attention over x, or the sum of attention over each (keys, values); projected."""
        if pairs is None:
            found = fused_linear([self.to_q, self.to_k, self.to_v], x, platform(self.sharding))
            q, *own = (self.split_heads(y) for y in found)
            pairs = [tuple(own)]
        else:
            q = self.split_heads(self.to_q(x))
            pairs = [(k.transpose(0, 3, 1, 2), v.swapaxes(1, 2)) for k, v in pairs]  # back from as_read
        out = sum(attend(q, k, v, self.sharding) for k, v in pairs)
        return self.to_out[0](out.reshape(x.shape))


def set_sharding(network: nnx.Module, sharding: NamedSharding) -> None:
    """Attention of a network runs from now on where its inputs lie, convolutions and products as is best there.

    Args:
        network: changed in place.
        sharding: of queries, keys and values [b n heads d_head]; its devices may be described ones.
    """
    for _, module in nnx.iter_modules(network):
        if hasattr(module, "sharding"):
            module.sharding = sharding


class GEGLU(nnx.Module):
    """a · gelu(b) of one projection, with the exact (erf) GELU."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        self.proj = linear(width, 2 * hidden, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n f"]:
        """The first half of the projection is gated by the second."""
        value, gate = jnp.split(self.proj(x), 2, axis=-1)
        return value * jax.nn.gelu(gate, approximate=False)


class FeedForward(nnx.Module):
    """GEGLU to four times the width and back."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        self.net = nnx.List(
            [
                GEGLU(width, 4 * width, rngs=rngs, dtype=dtype),
                Passthrough(),
                linear(4 * width, width, dtype=dtype, rngs=rngs),
            ]
        )

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """Applied to each token."""
        return self.net[2](self.net[0](x))


class BasicTransformerBlock(nnx.Module):
    """Self-attention, cross-attention, feed-forward, each after a LayerNorm and added to its input.

    `name` is where it is in its UNet, and in a :data:`Memory`.
    """

    def __init__(self, width: int, context_width: int, heads: int, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        self.name = ""
        self.norm1 = layer_norm(width, rngs=rngs, dtype=dtype)
        self.attn1 = Attention(width, width, heads, bias=False, rngs=rngs, dtype=dtype)
        self.norm2 = layer_norm(width, rngs=rngs, dtype=dtype)
        self.attn2 = Attention(width, context_width, heads, bias=False, rngs=rngs, dtype=dtype)
        self.norm3 = layer_norm(width, rngs=rngs, dtype=dtype)
        self.ff = FeedForward(width, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "b n d"], memory: Memory) -> Float[Array, "b2 n d"]:
        """`memory` holds the text's keys and values, of b rows or a multiple."""
        pairs = memory[self.name]
        x = in_rows(x + self.attn1(self.norm1(x)), len(pairs[0][0]))
        x = x + self.attn2(self.norm2(x), pairs)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nnx.Module):
    """Transformer blocks over the pixels of a feature map, between two projections, plus the input."""

    def __init__(
        self,
        channels: int,
        context_width: int,
        heads: int,
        layers: int,
        *,
        use_linear: bool,
        groups: int,
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
    ) -> None:
        def project() -> nnx.Module:
            if use_linear:
                return linear(channels, channels, dtype=dtype, rngs=rngs)
            return conv(channels, channels, 1, rngs=rngs, dtype=dtype)

        self.checkpointing = "none"
        self.norm = group_norm(channels, groups, 1e-6, rngs=rngs, dtype=dtype)
        self.proj_in = project()
        self.transformer_blocks = nnx.List(
            [BasicTransformerBlock(channels, context_width, heads, rngs=rngs, dtype=dtype) for _ in range(layers)]
        )
        self.proj_out = project()

    def __call__(self, x: Float[Array, "b h w c"], memory: Memory) -> Float[Array, "b2 h w c"]:
        """A 1x1 convolution and a Linear are the same on [b, h, w, c], so the order of reshaping does not matter."""
        tokens = self.proj_in(self.norm(x)).reshape(x.shape[0], -1, x.shape[-1])
        for block in self.transformer_blocks:
            tokens = checkpointed(block, self.checkpointing != "none")(tokens, memory)
        return self.proj_out(tokens.reshape(-1, *x.shape[1:])) + in_rows(x, len(tokens))
