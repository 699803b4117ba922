"""Convolutional blocks that UNet and VAE share. Arrays are [b, h, w, c]; names are those of diffusers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from hgdpo_jax.models.layers import conv, group_norm, in_rows, linear


def checkpointed(function: Callable[..., Array], active: bool) -> Callable[..., Array]:
    """The function, of whose values only the arguments are kept for the gradient when `active`: the rest is computed
    again (Chen et al. 2016)."""
    # A wrapper of its own for each use: jax.checkpoint takes functions, not modules.
    return jax.checkpoint(lambda *arguments: function(*arguments)) if active else function


class ResnetBlock2D(nnx.Module):
    """norm–SiLU–conv twice around the time embedding, plus a shortcut. `time_channels=None` for the VAE."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        groups: int,
        eps: float,
        time_channels: int | None,
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
    ) -> None:
        self.norm1 = group_norm(inputs, groups, eps, rngs=rngs, dtype=dtype)
        self.conv1 = conv(inputs, outputs, 3, rngs=rngs, dtype=dtype)
        if time_channels is not None:
            self.time_emb_proj = linear(time_channels, outputs, dtype=dtype, rngs=rngs)
        self.norm2 = group_norm(outputs, groups, eps, rngs=rngs, dtype=dtype)
        self.conv2 = conv(outputs, outputs, 3, rngs=rngs, dtype=dtype)
        if inputs != outputs:
            self.conv_shortcut = conv(inputs, outputs, 1, rngs=rngs, dtype=dtype)

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        temb: Float[Array, "b d"] | None = None,
        beside: Float[Array, "b h w c3"] | None = None,
    ) -> Float[Array, "b h w c2"]:
        """The block of x, or of x and what lies beside it.

        Args:
            x: without `beside` all channels of the input.
            temb: time embedding, needed where the block has a projection for it.
            beside: the channels behind x's. What is computed of them does not depend on x, but for those that are
                normalised in one group with some of x's.
        """
        if beside is None:
            h = self.conv1(jax.nn.silu(self.norm1(x)))
        else:
            mixed = -x.shape[-1] % self.norm1.group_size
            x, beside = jnp.concatenate([x, beside[..., :mixed]], axis=-1), beside[..., mixed:]
            h = self.conv1(jax.nn.silu(self.norm1(x)), jax.nn.silu(self.norm1(beside, x.shape[-1])))
        if temb is not None:
            h = h + in_rows(self.time_emb_proj(jax.nn.silu(temb)), len(h))[:, None, None, :]
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        if hasattr(self, "conv_shortcut"):
            return h + self.conv_shortcut(x, beside)
        return h + (x if beside is None else jnp.concatenate([x, beside], axis=-1))


class Downsample2D(nnx.Module):
    """Halves height and width. The VAE pads below and on the right only (`asymmetric`)."""

    def __init__(self, channels: int, *, asymmetric: bool = False, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        padding = ((0, 1), (0, 1)) if asymmetric else 1
        self.conv = conv(channels, channels, 3, stride=2, padding=padding, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        """Strided convolution."""
        return self.conv(x)


class Upsample2D(nnx.Module):
    """Doubles height and width: nearest neighbour, then a convolution."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        self.conv = conv(channels, channels, 3, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        """Both at once."""
        return self.conv.doubled(x)
