"""Classifier-free guidance (Ho and Salimans 2022)."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Latent = Float[Array, "b h w c"]
Denoise = Callable[[Float[Array, "n h w c"], Int[Array, "n"]], Float[Array, "n h w c"]]


def guided(denoise: Denoise, scale: float | Float[Array, ""]) -> Callable[[Latent, Int[Array, "b"]], Latent]:
    """uncond + scale · (cond − uncond), in one forward pass over both.

    Args:
        denoise: predicts for a batch of 2b, whose first half is unconditional.
        scale: 1 is no guidance.
    """

    def prediction(x: Latent, t: Int[Array, "b"]) -> Latent:
        both = denoise(jnp.concatenate([x, x]), jnp.concatenate([t, t]))
        uncond, cond = jnp.split(both, 2)
        return uncond + scale * (cond - uncond)

    return prediction
