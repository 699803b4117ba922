"""Convolutional blocks that UNet and VAE share. Arrays are [b, h, w, c]; names are those of diffusers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from hgdpo_jax.models.layers import Layers, in_rows


def checkpointed(function: Callable[..., Array], active: bool) -> Callable[..., Array]:
    """The function; when `active`, its gradient keeps the arguments only and computes the rest again
    (Chen et al. 2016)."""
    # A wrapper of its own for each use: jax.checkpoint takes functions, not modules.
    return jax.checkpoint(lambda *arguments: function(*arguments)) if active else function


class ResnetBlock2D(nnx.Module):
    """norm–SiLU–conv twice around the time embedding, plus a shortcut. `time_width=None` for the VAE."""

    def __init__(self, inputs: int, outputs: int, make: Layers, time_width: int | None = None) -> None:
        self.norm1 = make.group_norm(inputs)
        self.conv1 = make.conv(inputs, outputs, 3)
        if time_width is not None:
            self.time_emb_proj = make.linear(time_width, outputs)
        self.norm2 = make.group_norm(outputs)
        self.conv2 = make.conv(outputs, outputs, 3)
        if inputs != outputs:
            self.conv_shortcut = make.conv(inputs, outputs, 1)

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        temb: Float[Array, "b2 d"] | None = None,
        beside: Float[Array, "b h w c2"] | None = None,
    ) -> Float[Array, "b h w c3"]:
        """The block of x, or of x and `beside`.

        Args:
            x: all channels of the input, or the first.
            temb: time embedding of b rows or a divisor, needed where the block has a projection for it.
            beside: the other channels. What is computed from them does not depend on x, but for those that share a
                group of the normalisation with some of x's.
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

    def __init__(self, channels: int, make: Layers, asymmetric: bool = False) -> None:
        self.conv = make.conv(channels, channels, 3, stride=2, padding=((0, 1), (0, 1)) if asymmetric else 1)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        return self.conv(x)


class Upsample2D(nnx.Module):
    """Doubles height and width: nearest neighbour, then a convolution."""

    def __init__(self, channels: int, make: Layers) -> None:
        self.conv = make.conv(channels, channels, 3)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        """Both at once; h2 and w2 are twice h and w."""
        return self.conv.doubled(x)
