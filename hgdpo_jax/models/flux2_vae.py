"""The variational autoencoder of FLUX.2, driven by the config.json that diffusers writes.

Its networks are Stable Diffusion's. What a flow model sees are patches of 2×2 of its latents, normalised by mean and
variance of each of their channels, which are kept as a batch normalisation.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from hgdpo_jax.models.layers import Layers
from hgdpo_jax.models.model_config import ModelConfig, check_only
from hgdpo_jax.models.vae import AutoencoderKL

# What diffusers takes for keys that config.json leaves out. Of other keys it reads none, scaling_factor among them.
_DEFAULTS: dict[str, Any] = {"in_channels": 3, "out_channels": 3, "act_fn": "silu", "latent_channels": 32}
_DEFAULTS |= {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32}
_DEFAULTS |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
_DEFAULTS |= {"use_quant_conv": True, "use_post_quant_conv": True, "mid_block_add_attention": True}
_DEFAULTS |= {"batch_norm_eps": 1e-4, "patch_size": (2, 2), "decoder_block_out_channels": None}
_PATCH = 2


def patchify(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c4"]:
    """Patches of 2×2 become pixels: row dy and column dx of channel c are channel 4 c + 2 dy + dx."""
    b, h, w, c = x.shape
    patches = x.reshape(b, h // _PATCH, _PATCH, w // _PATCH, _PATCH, c)
    return patches.transpose(0, 1, 3, 5, 2, 4).reshape(b, h // _PATCH, w // _PATCH, -1)


def unpatchify(x: Float[Array, "b h w c4"]) -> Float[Array, "b h2 w2 c"]:
    """The inverse of :func:`patchify`."""
    b, h, w, _ = x.shape
    patches = x.reshape(b, h, w, -1, _PATCH, _PATCH)
    return patches.transpose(0, 1, 4, 2, 5, 3).reshape(b, h * _PATCH, w * _PATCH, -1)


class LatentStatistics(nnx.Module):
    """Mean and variance of each channel over the latents of a training set; PyTorch's BatchNorm2d without weights."""

    def __init__(self, channels: int, eps: float, make: Layers) -> None:
        self.eps = eps
        self.running_mean = make.statistic((channels,), 0.0)
        self.running_var = make.statistic((channels,), 1.0)
        self.num_batches_tracked = make.statistic((), 0, jnp.int32)  # which nothing reads

    def normalised(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return (x - self.running_mean[...]) / jnp.sqrt(self.running_var[...] + self.eps)

    def denormalised(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return x * jnp.sqrt(self.running_var[...] + self.eps) + self.running_mean[...]


class AutoencoderKLFlux2(AutoencoderKL):
    """Images [b, H, W, 3] in [-1, 1] ↔ normalised latents of patches [b, H/16, W/16, 128], in FLUX.2's sizes.

    :meth:`encode` and :meth:`decode` are between images and the latents themselves, [b, H/8, W/8, 32].

    Raises:
        UserError: a config value that changes the computation in a way that is not implemented.
    """

    def __init__(self, config: Mapping[str, Any], *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        values = {key: config.get(key, default) for key, default in _DEFAULTS.items()}
        only = {"patch_size": ([_PATCH, _PATCH], (_PATCH, _PATCH)), "decoder_block_out_channels": (None,)}
        check_only(values, only, "VAE")
        super().__init__(values | {"scaling_factor": 1.0}, rngs=rngs, dtype=dtype)
        self.config = ModelConfig(config)
        self.pixels_per_latent *= _PATCH
        channels = _PATCH**2 * values["latent_channels"]
        self.bn = LatentStatistics(channels, float(values["batch_norm_eps"]), Layers(rngs, dtype))

    def to_latents(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b h w c"]:
        """The mean of the latent, as patches and normalised."""
        return self.bn.normalised(patchify(super().to_latents(images)))

    def to_images(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b H W 3"]:
        """Images in [-1, 1] of normalised latents of patches."""
        return super().to_images(unpatchify(self.bn.denormalised(latents)))
