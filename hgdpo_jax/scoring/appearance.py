"""Sharpness and hue of images in [-1, 1]."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Images = Float[Array, "b H W 3"]


def sharpness(images: Images) -> Float[Array, "b"]:
    """Standard deviation of the 4-neighbour Laplacian of the grey image in [0, 255] (ATHEC's sharpness)."""
    grey = (images + 1.0) * 127.5 @ jnp.asarray([0.299, 0.587, 0.114])
    inner = grey[:, 1:-1, 1:-1]
    around = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:]
    return jnp.std(around - 4.0 * inner, axis=(1, 2))


def hue_vector(images: Images) -> Float[Array, "b 2"]:
    """Mean of the unit vectors at each pixel's HSV hue; grey pixels, which have no hue, count as zero.

    The angle of the vector is the circular mean of the hue.
    """
    red, green, blue = jnp.moveaxis(images, -1, 0)
    # The hue's direction in the plane across the grey axis; its angle is the hexagonal hue's to within 1.2 degrees.
    x, y = red - 0.5 * (green + blue), 0.5 * jnp.sqrt(3.0) * (green - blue)
    length = jnp.sqrt(x * x + y * y)
    unit = jnp.where(length > 1e-4, 1.0 / jnp.maximum(length, 1e-4), 0.0)
    return jnp.stack([jnp.mean(x * unit, axis=(1, 2)), jnp.mean(y * unit, axis=(1, 2))], axis=-1)


def hue_angle(a: Float[np.ndarray, "*n 2"], b: Float[np.ndarray, "*n 2"]) -> Float[np.ndarray, "*n"]:
    """The angle in degrees, 0…180, between the mean hues of two sets of images, image by image."""
    angle = np.arctan2(a[..., 1], a[..., 0]) - np.arctan2(b[..., 1], b[..., 0])
    return np.abs(np.degrees((angle + np.pi) % (2 * np.pi) - np.pi))
