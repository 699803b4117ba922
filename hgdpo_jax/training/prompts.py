"""Prompts of one's own, drawn at each look from fixed seeds, beside what ε_base draws for them."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from hgdpo_jax.diffusion.sampler import Sampler
from hgdpo_jax.pictures.sheet import sheet
from hgdpo_jax.pictures.write import to_uint8


class Prompts:
    """Draws prompts with what a sampler uses.

    Args:
        prompts: one or more.
        sampler: of the looks.
        resolution: height and width, pixels.
    """

    def __init__(self, prompts: Sequence[str], sampler: Sampler, resolution: tuple[int, int]) -> None:
        self._sampler, self._resolution = sampler, resolution
        self._ids = sampler.tokenize(prompts)
        self._keys = sampler.keys("prompts", prompts, [0] * len(prompts))
        sampler.use_policies()
        self._base = self._draw()

    def _draw(self) -> UInt8[np.ndarray, "n H W 3"]:
        latents = self._sampler.generate(self._ids, self._keys, self._resolution, "prompts")
        return to_uint8(self._sampler.decode(latents, "decode"))

    def sheet(self, step: int) -> UInt8[np.ndarray, "H W 3"]:
        """ε_base's drawings, and below them those of the policies that the sampler uses, a column for each prompt."""
        return sheet({"base": self._base, f"step {step}": self._draw()})
