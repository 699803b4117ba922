"""Pictures of an evaluated run that are made to be looked at: W/portrait.png and W/persons.png.

A row for each model, with its name; a column for each prompt or person.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from hgdpo_jax.pictures.sheet import Rows, sheet
from hgdpo_jax.pictures.write import to_uint8, write_png
from hgdpo_jax.scoring.personalised import KEPT, PeoplePictures

PORTRAIT, PERSONS = "portrait.png", "persons.png"
COLUMNS = 12  # of the portrait


def write(workdir: Path, pictures: Rows, captions: Sequence[str]) -> None:
    """Writes portrait.png: what each model drew for twelve of these captions, different ones if there are as many."""
    chosen = [i for i, caption in enumerate(captions) if caption not in captions[:i]]
    if len(chosen) < COLUMNS:
        chosen = [*range(len(captions))]
    shown = {name: images[chosen[:COLUMNS]] for name, images in pictures.items()}
    write_png(workdir / PORTRAIT, sheet(shown), {})


def write_people(
    workdir: Path, models: Mapping[str, PeoplePictures], photographs: Float[np.ndarray, "n H W 3"], prompts: int
) -> None:
    """Writes persons.png: the first people's photographs in [-1, 1], and what each model drew of them for the first of
    so many prompts. Without models it removes that of an earlier evaluation."""
    if not models:
        (workdir / PERSONS).unlink(missing_ok=True)
        return
    drawn = {name: found.pictures[::prompts] for name, found in models.items()}
    count = min(KEPT, len(photographs), *map(len, drawn.values()))
    shown = {name: to_uint8(images[:count]) for name, images in {"photograph": photographs, **drawn}.items()}
    write_png(workdir / PERSONS, sheet(shown), {})
