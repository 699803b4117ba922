"""The variational autoencoder of Stable Diffusion, driven by the config.json that diffusers writes."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from hgdpo_jax.models.attend import attend
from hgdpo_jax.models.attention import Attention
from hgdpo_jax.models.layers import Layers
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


class VAEAttention(nnx.Module):
    """Single-head self-attention over the pixels, plus its input."""

    def __init__(self, channels: int, make: Layers) -> None:
        self.sharding: NamedSharding | None = None
        self.group_norm = make.group_norm(channels)
        attention = Attention(channels, channels, 1, make, bias=True)
        self.to_q, self.to_k, self.to_v, self.to_out = attention.to_q, attention.to_k, attention.to_v, attention.to_out

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        tokens = self.group_norm(x).reshape(x.shape[0], -1, 1, x.shape[-1])
        q, k, v = (project(tokens) for project in (self.to_q, self.to_k, self.to_v))
        return x + self.to_out[0](attend(q, k, v, self.sharding)).reshape(x.shape)


class VAEMidBlock(nnx.Module):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int, make: Layers) -> None:
        self.attentions = nnx.List([VAEAttention(channels, make)])
        self.resnets = nnx.List([ResnetBlock2D(channels, channels, make) for _ in range(2)])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class VAEBlock(nnx.Module):
    """Residual blocks of one level, then a resampling: "down", "up" or none."""

    def __init__(self, inputs: int, outputs: int, layers: int, resample: str | None, make: Layers) -> None:
        self.resnets = nnx.List([ResnetBlock2D(outputs if i else inputs, outputs, make) for i in range(layers)])
        if resample == "down":
            self.downsamplers = nnx.List([Downsample2D(outputs, make, asymmetric=True)])
        if resample == "up":
            self.upsamplers = nnx.List([Upsample2D(outputs, make)])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        for resnet in self.resnets:
            x = resnet(x)
        if hasattr(self, "downsamplers"):
            x = self.downsamplers[0](x)
        return self.upsamplers[0](x) if hasattr(self, "upsamplers") else x


def _blocks(widths: Sequence[int], layers: int, resample: str, make: Layers) -> nnx.List:
    """One block a width, each but the last with a resampling."""
    last, inputs = len(widths) - 1, [widths[0], *widths[:-1]]
    sizes = enumerate(zip(inputs, widths, strict=True))
    return nnx.List([VAEBlock(i, o, layers, resample if n < last else None, make) for n, (i, o) in sizes])


class Encoder(nnx.Module):
    """Image → moments."""

    def __init__(self, widths: Sequence[int], layers: int, latent: int, make: Layers) -> None:
        self.conv_in = make.conv(3, widths[0], 3)
        self.down_blocks = _blocks(widths, layers, "down", make)
        self.mid_block = VAEMidBlock(widths[-1], make)
        self.conv_norm_out = make.group_norm(widths[-1])
        self.conv_out = make.conv(widths[-1], 2 * latent, 3)

    def __call__(self, x: Float[Array, "b H W 3"]) -> Float[Array, "b h w moments"]:
        """Mean and log-variance along the channels, before quant_conv."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """Latent → image."""

    def __init__(self, widths: Sequence[int], layers: int, latent: int, make: Layers) -> None:
        self.conv_in = make.conv(latent, widths[-1], 3)
        self.mid_block = VAEMidBlock(widths[-1], make)
        self.up_blocks = _blocks(widths[::-1], layers + 1, "up", make)
        self.conv_norm_out = make.group_norm(widths[0])
        self.conv_out = make.conv(widths[0], 3, 3)

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

    def __init__(self, config: Mapping[str, Any], *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        check_only(config, _ONLY, "VAE")
        for key, only in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            for name in config.get(key, ()):
                check_only({key: name}, {key: (only,)}, "VAE")
        self.config = ModelConfig(config)
        self.scaling_factor = float(config.get("scaling_factor", 0.18215))
        self.pixels_per_latent = 2 ** (len(config["block_out_channels"]) - 1)
        make = Layers(rngs, dtype, config.get("norm_num_groups", 32), eps=1e-6)
        latent = config.get("latent_channels", 4)
        sizes = (list(config["block_out_channels"]), config.get("layers_per_block", 1), latent)
        self.encoder, self.decoder = Encoder(*sizes, make), Decoder(*sizes, make)
        if config.get("use_quant_conv", True):
            self.quant_conv = make.conv(2 * latent, 2 * latent, 1)
        if config.get("use_post_quant_conv", True):
            self.post_quant_conv = make.conv(latent, latent, 1)

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
        """The mean of the latent, scaled."""
        return self.encode(images)[0] * self.scaling_factor

    def to_images(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b H W 3"]:
        """Images in [-1, 1] of scaled latents."""
        return jnp.clip(self.decode(latents / self.scaling_factor), -1.0, 1.0)
