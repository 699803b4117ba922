"""Candidates of some prompts with their scores, and the best and the worst of them."""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int


class Candidates(NamedTuple):
    """m latents for each of n prompts, their scores, and their numbers (in the pool, or strengths)."""

    latents: Float[Array | np.ndarray, "n m h w c"]
    scores: Float[Array | np.ndarray, "n m"]
    numbers: Int[Array | np.ndarray, "m"]


class Chosen(NamedTuple):
    """One candidate for each of n prompts."""

    latents: Float[Array | np.ndarray, "n h w c"]
    scores: Float[Array | np.ndarray, "n"]
    numbers: Int[Array | np.ndarray, "n"]


@jax.jit
def best(candidates: Candidates) -> Chosen:
    """The candidate with the highest score of each prompt."""
    index = candidates.scores.argmax(1)
    # Row by row: each device chooses among its own.
    latents, scores = (jax.vmap(lambda row, i: row[i])(x, index) for x in (candidates.latents, candidates.scores))
    return Chosen(latents, scores, candidates.numbers[index])


@jax.jit
def worst(candidates: Candidates) -> Chosen:
    """The candidate with the lowest score of each prompt."""
    chosen = best(candidates._replace(scores=-candidates.scores))
    return chosen._replace(scores=-chosen.scores)
