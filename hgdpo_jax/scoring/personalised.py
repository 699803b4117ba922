"""Personalised generation: people of held-out photographs drawn anew, and how much they still look like themselves."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from hgdpo_jax.data.photographs import Photograph
from hgdpo_jax.data.pixels import load_images
from hgdpo_jax.diffusion.pipeline import Pipeline
from hgdpo_jax.diffusion.sampler import Sampler
from hgdpo_jax.faces.concepts import ConceptEncoder
from hgdpo_jax.faces.embedding import FaceEmbedder
from hgdpo_jax.run import processes

SHOWN = 3  # people in the report


class PeoplePictures(NamedTuple):
    """What a model drew of n people, the same k prompts and seeds for each.

    `distance` is from a person's photograph, `to_other` from another's; pictures are those of the first people that
    this process drew.
    """

    distance: Float[np.ndarray, "n k"]
    to_other: Float[np.ndarray, "n k"]
    found: Bool[np.ndarray, "n k"]
    pictures: Float[np.ndarray, "s H W 3"]


def measures(models: Mapping[str, PeoplePictures]) -> dict[str, dict[str, float | None]]:
    """Model → its measures, over the drawings in which a face is found; standard errors are over people.

    `nearer` is how much nearer the drawings are to their own person than to another, `change` how much farther from
    their own than the first model's, where both have a face. None where there is no such drawing, or one person.
    """
    first, found = next(iter(models.values())), {}
    for name, drawn in models.items():
        found[name] = {"faces_found": float(drawn.found.mean())}
        for key, values, counts in (
            ("identity_distance", drawn.distance, drawn.found),
            ("distance_to_another_person", drawn.to_other, drawn.found),
            ("nearer", drawn.to_other - drawn.distance, drawn.found),
            ("change", drawn.distance - first.distance, drawn.found & first.found),
        ):
            people = [v[c].mean() for v, c in zip(values, counts, strict=True) if c.any()]
            error = np.std(people, ddof=1) / np.sqrt(len(people)) if len(people) > 1 else None
            found[name][key] = float(np.mean(people)) if people else None
            found[name][f"{key}_standard_error"] = None if error is None else float(error)
    return found


def lines(measured: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    """What :func:`measures` found, in words, a line for each model."""

    def number(row: Mapping[str, float | None], key: str) -> str:
        value, error = row[key], row[f"{key}_standard_error"]
        return "–" if value is None else f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"

    return [
        f"{name} + adapter: identity distance {number(row, 'identity_distance')}, to another person "
        f"{number(row, 'distance_to_another_person')}, nearer by {number(row, 'nearer')}; faces in "
        f"{row['faces_found']:.0%}" + (f"; change {number(row, 'change')}" if i else "")
        for i, (name, row) in enumerate(measured.items())
    ]


def prompts_of(photograph: Photograph, templates: Sequence[str]) -> list[str]:
    """The prompts for a person; {subject} is the photograph's caption up to the first comma."""
    return [template.replace("{subject}", photograph.caption.split(",")[0]) for template in templates]


def draw(
    pipeline: Pipeline,
    sampler: Sampler,
    encoder: ConceptEncoder,
    identity: FaceEmbedder,
    people: Sequence[Photograph],
    resolution: tuple[int, int],
    templates: Sequence[str],
    models: Mapping[str, Sequence[Any]],
) -> dict[str, PeoplePictures]:
    """Draws each person with each prompt.

    Args:
        pipeline, sampler: with an adapter.
        encoder: of what that adapter reads.
        identity: measures.
        people: their photographs, which can be read.
        resolution: height and width that photographs are cut to and drawings have.
        templates: see :func:`prompts_of`.
        models: name → the policies that draw.
    """
    k, few = len(templates), sampler.whole_batches(len(templates))

    def photographs(numbers: np.ndarray) -> np.ndarray:
        return load_images([people[number] for number in numbers], resolution)[1]

    own = processes.map_over_processes(
        len(people), lambda some: identity.embed(photographs(some)).embedding, few, "photographs"
    )
    other, drawn = np.roll(own, 1, axis=0), {}
    for name, policies in models.items():
        sampler.use_policies(*policies)

        shown: list[np.ndarray] = []

        def draw_some(numbers: np.ndarray, name: str = name, shown: list = shown) -> tuple[np.ndarray, ...]:
            some, shape = [people[number] for number in numbers], (len(numbers), k)
            ids = pipeline.tokenize([prompt for person in some for prompt in prompts_of(person, templates)])
            keys = sampler.keys("personalised", [p.id for p in some for _ in range(k)], [*range(k)] * len(some))
            concept = np.repeat(encoder(photographs(numbers)).features, k, axis=0)
            latents = sampler.generate(ids, keys, resolution, f"draw people, {name}", concept)
            pictures = sampler.decode(latents, "decode")
            embedding, found, _ = identity.embed(pictures)
            distances = [identity.distance(embedding, np.repeat(of[numbers], k, axis=0)) for of in (own, other)]
            shown.extend(pictures[: SHOWN * k - len(shown)])
            return distances[0].reshape(shape), distances[1].reshape(shape), found.reshape(shape)

        measured = processes.map_over_processes(len(people), draw_some, few, f"people, {name}")
        drawn[name] = PeoplePictures(*measured, np.stack(shown))
    return drawn
