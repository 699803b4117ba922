"""Classifier-free guidance (Ho and Salimans 2022)."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from hgdpo_jax.diffusion.schedule import Latent, Timesteps

Denoise = Callable[[Latent, Timesteps], Latent]  # (x_t, t) → what the network predicts
DenoiseBoth = Callable[[Latent, Timesteps], Float[Array, "2*b h w c"]]


def side_by_side(uncond: Shaped[Array, "b *n"], cond: Shaped[Array, "b *n"]) -> Shaped[Array, "2*b *n"]:
    """Rows in turn, so that both of an example lie on its device."""
    return jnp.stack([uncond, cond], axis=1).reshape(-1, *cond.shape[1:])


def guided(denoise: DenoiseBoth, scale: float | np.float32 | Float[Array, ""]) -> Denoise:
    """uncond + scale · (cond − uncond), in one forward pass for both.

    Args:
        denoise: predicts for each example without and with its text, which are :func:`side_by_side`.
        scale: 1 is no guidance.
    """

    def prediction(x: Latent, t: Timesteps) -> Latent:
        both = denoise(x, t)
        uncond, cond = both[0::2], both[1::2]
        return uncond + scale * (cond - uncond)

    return prediction
