"""A photograph's reconstructions at every strength of its stage. Pairs hold the best alone; the others are drawn again,
from the same seeds."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from hgdpo_jax.curriculum.winners import Group, reconstructions
from hgdpo_jax.data.photographs import Photograph
from hgdpo_jax.devices.mesh import local_mesh
from hgdpo_jax.devices.sharding import parameter_placer
from hgdpo_jax.diffusion.pipeline import load_pipeline
from hgdpo_jax.diffusion.sampler import Sampler
from hgdpo_jax.pictures.write import require_finite


def strengths_of(config: ConfigDict) -> tuple[int, ...]:
    """The strengths of which a stage's winner is the best; none where there is no choice."""
    several = config.pairs.winner == "sdrecon" and len(config.pairs.strengths) > 1
    return tuple(config.pairs.strengths) if several else ()


class Reconstructor:
    """Photographs → their reconstructions, in pixels, with a stage's base, which is loaded once it is needed.

    Args:
        config: of the stage.
    """

    def __init__(self, config: ConfigDict) -> None:
        self._config, self.strengths = config, strengths_of(config)

    @cached_property
    def _sampler(self) -> Sampler:
        model, mesh = self._config.model, local_mesh()
        pipeline = load_pipeline(
            model.base,
            model.dtype,
            vae=model.vae,
            lora=model.lora,
            param_dtype=model.dtype,
            place=parameter_placer(mesh),
        )
        return Sampler.from_config(pipeline, mesh, self._config.pairs, self._config.seed)

    def __call__(
        self, photographs: Sequence[Photograph], images: Float[np.ndarray, "n H W 3"]
    ) -> Float[np.ndarray, "n m H W 3"]:
        """Images in [-1, 1], of each photograph at each of m strengths.

        Raises:
            UserError: one holds NaN or infinity; it is named.
        """
        ids = self._sampler.tokenize([photograph.caption for photograph in photographs])
        group = Group(photographs, ids, (images.shape[1], images.shape[2]), images)
        _, found = reconstructions(self._sampler, group, self.strengths, lambda decoded, _: decoded)
        found = np.asarray(found)
        for photograph, of_one in zip(photographs, found, strict=True):
            require_finite(of_one, [f"t{strength} of {photograph.id}" for strength in self.strengths])
        return found
