"""Classifier-free guidance (Ho and Salimans 2022)."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Latent = Float[Array, "b h w c"]
Denoise = Callable[[Latent, Int[Array, "b"]], Float[Array, "2b h w c"]]


def side_by_side(uncond: Float[Array, "b *n"], cond: Float[Array, "b *n"]) -> Float[Array, "2b *n"]:
    """Rows in turn, so that both of an example lie on its device."""
    return jnp.stack([uncond, cond], axis=1).reshape(-1, *cond.shape[1:])


def guided(denoise: Denoise, scale: float | Float[Array, ""]) -> Callable[[Latent, Int[Array, "b"]], Latent]:
    """uncond + scale · (cond − uncond), in one forward pass for both.

    Args:
        denoise: predicts for each example without and with its text, which are :func:`side_by_side`.
        scale: 1 is no guidance.
    """

    def prediction(x: Latent, t: Int[Array, "b"]) -> Latent:
        both = denoise(x, t)
        uncond, cond = both[0::2], both[1::2]
        return uncond + scale * (cond - uncond)

    return prediction
