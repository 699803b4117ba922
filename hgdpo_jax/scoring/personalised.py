"""Personalised generation: held-out people drawn anew, and how much they still look like themselves."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from hgdpo_jax.data.photographs import Photograph
from hgdpo_jax.data.pixels import load_images
from hgdpo_jax.diffusion.sampler import Sampler
from hgdpo_jax.faces.concepts import ConceptEncoder
from hgdpo_jax.faces.embedding import FaceEmbedder
from hgdpo_jax.run import processes

KEPT = 8  # people whose drawings stay, to be shown


class PeoplePictures(NamedTuple):
    """What a model drew of n people, the same k prompts and seeds for each: its distances from the person's photograph
    and from another person's, whether there is a face, and the pictures of the first people that this process drew."""

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
        row: dict[str, float | None] = {"faces_found": float(drawn.found.mean())}
        for key, values, counts in (
            ("identity_distance", drawn.distance, drawn.found),
            ("distance_to_another_person", drawn.to_other, drawn.found),
            ("nearer", drawn.to_other - drawn.distance, drawn.found),
            ("change", drawn.distance - first.distance, drawn.found & first.found),
        ):
            people = [v[c].mean() for v, c in zip(values, counts, strict=True) if c.any()]
            row[key] = float(np.mean(people)) if people else None
            several = len(people) > 1
            row[f"{key}_standard_error"] = float(np.std(people, ddof=1) / np.sqrt(len(people))) if several else None
        found[name] = row
    return found


def lines(measured: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    """The measures in words, a line for each model."""

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


class PersonalisedDrawing(NamedTuple):
    """Draws each of n people with each of k prompts, and measures their faces.

    Attributes:
        sampler: of a pipeline with an adapter.
        encoder: of the concept images that this adapter reads.
        identity: measures distances between faces.
        people: their photographs, which can be read.
        resolution: height and width that photographs are cut to and drawings have.
        templates: see :func:`prompts_of`.
    """

    sampler: Sampler
    encoder: ConceptEncoder
    identity: FaceEmbedder
    people: Sequence[Photograph]
    resolution: tuple[int, int]
    templates: Sequence[str]

    def draw(self, models: Mapping[str, Sequence[Any]]) -> dict[str, PeoplePictures]:
        """What each model draws, given by name with its policies."""
        few, count, drawn = self.sampler.whole_batches(len(self.templates)), len(self.people), {}
        own = processes.map_over_processes(
            count, lambda numbers: self.identity.embed(self._photographs(numbers)).embedding, few, "photographs"
        )
        for name, policies in models.items():
            self.sampler.use_policies(*policies)
            shown: list[np.ndarray] = []

            def draw_some(numbers: np.ndarray, name: str = name, shown: list = shown) -> tuple[np.ndarray, ...]:
                pictures = self._pictures(numbers, name)
                shown.extend(pictures[: KEPT * len(self.templates) - len(shown)])
                return self._measured(pictures, numbers, own)

            distance, to_other, found = processes.map_over_processes(count, draw_some, few, f"people, {name}")
            drawn[name] = PeoplePictures(distance, to_other, found, np.stack(shown))
        return drawn

    def _photographs(self, numbers: np.ndarray) -> Float[np.ndarray, "m H W 3"]:
        return load_images([self.people[number] for number in numbers], self.resolution)[1]

    def _pictures(self, numbers: np.ndarray, name: str) -> Float[np.ndarray, "mk H W 3"]:
        """Drawings of some people, k of each in a row."""
        some, k = [self.people[number] for number in numbers], len(self.templates)
        ids = self.sampler.tokenize([prompt for person in some for prompt in prompts_of(person, self.templates)])
        keys = self.sampler.keys("personalised", [p.id for p in some for _ in range(k)], [*range(k)] * len(some))
        concept = np.repeat(self.encoder(self._photographs(numbers)).features, k, axis=0)
        latents = self.sampler.generate(ids, keys, self.resolution, f"draw people, {name}", concept)
        return self.sampler.decode(latents, "decode")

    def _measured(self, pictures: np.ndarray, numbers: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, ...]:
        """Distances of some people's drawings to themselves and to the person before, and whether there is a face."""
        embedding, found, _ = self.identity.embed(pictures)
        shape = len(numbers), len(self.templates)
        to_own, to_other = (
            self.identity.distance(embedding, np.repeat(people[numbers], shape[1], axis=0)).reshape(shape)
            for people in (own, np.roll(own, 1, axis=0))
        )
        return to_own, to_other, found.reshape(shape)
