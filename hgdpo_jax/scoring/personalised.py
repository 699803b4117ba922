"""Personalised generation: people of held-out photographs drawn anew, and how much they still look like themselves."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from hgdpo_jax.data.concepts import ConceptEncoder
from hgdpo_jax.data.photographs import Photograph
from hgdpo_jax.diffusion.painter import Painter
from hgdpo_jax.diffusion.pipeline import Pipeline
from hgdpo_jax.scoring.identity import Identity

SHOWN = 3  # people in the report


class Drawn(NamedTuple):
    """What a model drew of n people, the same k prompts and seeds for each.

    `distance` is from a person's photograph, `to_other` from another's; pictures are those of the first people.
    """

    distance: Float[np.ndarray, "n k"]
    to_other: Float[np.ndarray, "n k"]
    found: Bool[np.ndarray, "n k"]
    pictures: Float[np.ndarray, "s H W 3"]

    def measures(self) -> dict[str, float]:
        """Means over people, and the standard error of the first."""
        people = self.distance.mean(1)
        return {
            "identity_distance": float(people.mean()),
            "identity_standard_error": float(people.std(ddof=1) / np.sqrt(len(people))) if len(people) > 1 else 0.0,
            "distance_to_another_person": float(self.to_other.mean()),
            "faces_found": float(self.found.mean()),
        }


def prompts_of(photograph: Photograph, templates: Sequence[str]) -> list[str]:
    """The prompts for a person; {subject} is the photograph's caption up to the first comma."""
    return [template.replace("{subject}", photograph.caption.split(",")[0]) for template in templates]


def draw(
    pipeline: Pipeline,
    painter: Painter,
    encoder: ConceptEncoder,
    identity: Identity,
    people: Sequence[Photograph],
    images: Float[np.ndarray, "n H W 3"],
    templates: Sequence[str],
    models: Mapping[str, Sequence[Any]],
) -> dict[str, Drawn]:
    """Draws each person with each prompt.

    Args:
        pipeline, painter: with an adapter.
        encoder: of what that adapter reads.
        identity: measures.
        people, images: the concept photographs, square or of the size that is drawn.
        templates: see :func:`prompts_of`.
        models: name → the policies that draw.
    """
    k, resolution = len(templates), images.shape[1:3]
    ids = pipeline.tokenize([prompt for person in people for prompt in prompts_of(person, templates)])
    concept = np.repeat(encoder(images).features, k, axis=0)
    keys = painter.keys("personalised", [p.id for p in people for _ in range(k)], [i for _ in people for i in range(k)])
    own = np.repeat(identity.embed(images).embedding, k, axis=0)
    drawn = {}
    for name, policies in models.items():
        painter.use(*policies)
        latents = painter.generate(ids, keys, resolution, f"draw people, {name}", concept)
        pictures = painter.decode(latents, "decode")
        embedding, found = identity.embed(pictures)
        shape = (len(people), k)
        drawn[name] = Drawn(
            identity.distance(embedding, own).reshape(shape),
            identity.distance(embedding, np.roll(own, k, axis=0)).reshape(shape),
            found.reshape(shape),
            pictures[: SHOWN * k],
        )
    return drawn
