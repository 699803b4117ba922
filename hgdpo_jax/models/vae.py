"""The variational autoencoder of Stable Diffusion, driven by the config.json that diffusers writes."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from hgdpo_jax.models.attend import attend
from hgdpo_jax.models.attention import Attention
from hgdpo_jax.models.layers import conv, group_norm
from hgdpo_jax.models.model_config import ModelConfig, check_only
from hgdpo_jax.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D

_ONLY: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "in_channels": (3,),
    "out_channels": (3,),
    "latents_mean": (None,),
    "latents_std": (None,),
    "mid_block_add_attention": (True,),
    "shift_factor": (None, 0.0),
}
_EPS = 1e-6


class VAEAttention(nnx.Module):
    """Single-head self-attention over the pixels, plus its input."""

    def __init__(self, channels: int, groups: int, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        self.sharding: NamedSharding | None = None
        self.group_norm = group_norm(channels, groups, _EPS, rngs=rngs, dtype=dtype)
        attention = Attention(channels, channels, 1, bias=True, rngs=rngs, dtype=dtype)
        self.to_q, self.to_k, self.to_v, self.to_out = attention.to_q, attention.to_k, attention.to_v, attention.to_out

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Pixels are the tokens."""
        tokens = self.group_norm(x).reshape(x.shape[0], -1, 1, x.shape[-1])
        q, k, v = (project(tokens) for project in (self.to_q, self.to_k, self.to_v))
        return x + self.to_out[0](attend(q, k, v, self.sharding)).reshape(x.shape)


class VAEMidBlock(nnx.Module):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int, groups: int, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        self.attentions = nnx.List([VAEAttention(channels, groups, rngs=rngs, dtype=dtype)])
        self.resnets = nnx.List([_resnet(channels, channels, groups, rngs, dtype) for _ in range(2)])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """The lowest level."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class VAEBlock(nnx.Module):
    """Residual blocks of one level, then a resampling."""

    def __init__(
        self, inputs: int, outputs: int, layers: int, groups: int, resample: str | None, *, rngs: nnx.Rngs, dtype: Any
    ) -> None:
        self.resnets = nnx.List(
            [_resnet(inputs if i == 0 else outputs, outputs, groups, rngs, dtype) for i in range(layers)]
        )
        if resample == "down":
            self.downsamplers = nnx.List([Downsample2D(outputs, asymmetric=True, rngs=rngs, dtype=dtype)])
        if resample == "up":
            self.upsamplers = nnx.List([Upsample2D(outputs, rngs=rngs, dtype=dtype)])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        """All blocks in turn."""
        for resnet in self.resnets:
            x = resnet(x)
        if hasattr(self, "downsamplers"):
            x = self.downsamplers[0](x)
        return self.upsamplers[0](x) if hasattr(self, "upsamplers") else x


class Encoder(nnx.Module):
    """Image → moments."""

    def __init__(
        self, widths: Sequence[int], layers: int, groups: int, latent: int, *, rngs: nnx.Rngs, dtype: Any
    ) -> None:
        self.conv_in = conv(3, widths[0], 3, rngs=rngs, dtype=dtype)
        ins = [widths[0], *widths[:-1]]
        self.down_blocks = nnx.List(
            [
                VAEBlock(i, o, layers, groups, "down" if n < len(widths) - 1 else None, rngs=rngs, dtype=dtype)
                for n, (i, o) in enumerate(zip(ins, widths, strict=True))
            ]
        )
        self.mid_block = VAEMidBlock(widths[-1], groups, rngs=rngs, dtype=dtype)
        self.conv_norm_out = group_norm(widths[-1], groups, _EPS, rngs=rngs, dtype=dtype)
        self.conv_out = conv(widths[-1], 2 * latent, 3, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "b H W 3"]) -> Float[Array, "b h w 2c"]:
        """Mean and log-variance along the channels, before quant_conv."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """Latent → image."""

    def __init__(
        self, widths: Sequence[int], layers: int, groups: int, latent: int, *, rngs: nnx.Rngs, dtype: Any
    ) -> None:
        widths = list(reversed(widths))
        self.conv_in = conv(latent, widths[0], 3, rngs=rngs, dtype=dtype)
        self.mid_block = VAEMidBlock(widths[0], groups, rngs=rngs, dtype=dtype)
        ins = [widths[0], *widths[:-1]]
        self.up_blocks = nnx.List(
            [
                VAEBlock(i, o, layers + 1, groups, "up" if n < len(widths) - 1 else None, rngs=rngs, dtype=dtype)
                for n, (i, o) in enumerate(zip(ins, widths, strict=True))
            ]
        )
        self.conv_norm_out = group_norm(widths[-1], groups, _EPS, rngs=rngs, dtype=dtype)
        self.conv_out = conv(widths[-1], 3, 3, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W 3"]:
        """After post_quant_conv."""
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class AutoencoderKL(nnx.Module):
    """Images [b, H, W, 3] in [-1, 1] ↔ latents [b, h, w, c].

    Raises:
        UserError: a config value that changes the computation in a way that is not implemented.
    """

    def __init__(self, config: Mapping[str, Any], *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32) -> None:
        check_only(config, _ONLY, "VAE")
        for key, only in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            for name in config.get(key, ()):
                check_only({key: name}, {key: (only,)}, "VAE")
        self.config = ModelConfig(config)
        self.scaling_factor = float(config.get("scaling_factor", 0.18215))
        self.pixels_per_latent = 2 ** (len(config["block_out_channels"]) - 1)
        latent = config.get("latent_channels", 4)
        args = (config["block_out_channels"], config.get("layers_per_block", 1), config.get("norm_num_groups", 32))
        self.encoder = Encoder(*args, latent, rngs=rngs, dtype=dtype)
        self.decoder = Decoder(*args, latent, rngs=rngs, dtype=dtype)
        if config.get("use_quant_conv", True):
            self.quant_conv = conv(2 * latent, 2 * latent, 1, rngs=rngs, dtype=dtype)
        if config.get("use_post_quant_conv", True):
            self.post_quant_conv = conv(latent, latent, 1, rngs=rngs, dtype=dtype)

    def encode(self, images: Float[Array, "b H W 3"]) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
        """(mean, log-variance in [-30, 20]) of the unscaled latent."""
        moments = self.encoder(images)
        if hasattr(self, "quant_conv"):
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b H W 3"]:
        """Images of unscaled latents; values may leave [-1, 1] a little."""
        return self.decoder(self.post_quant_conv(latents) if hasattr(self, "post_quant_conv") else latents)

    def to_latents(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b h w c"]:
        """Scaled latents: the mean."""
        return self.encode(images)[0] * self.scaling_factor

    def to_images(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b H W 3"]:
        """Images in [-1, 1] of scaled latents."""
        return jnp.clip(self.decode(latents / self.scaling_factor), -1.0, 1.0)


def _resnet(inputs: int, outputs: int, groups: int, rngs: nnx.Rngs, dtype: Any) -> ResnetBlock2D:
    return ResnetBlock2D(inputs, outputs, groups=groups, eps=_EPS, time_channels=None, rngs=rngs, dtype=dtype)
