"""Candidates of some prompts with their scores, and the best and the worst of them.

`n` prompts, `m` candidates of each, `s` scorers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Integer

_MORE = 1e-3  # the weight of the first of several scorers above the others': less than a rank of a hundred candidates


class Candidates(NamedTuple):
    """m latents for each of n prompts, their scores (of each scorer until they are ranked), and their numbers (in the
    pool, or strengths), which all prompts have in common or each has for itself."""

    latents: Float[np.ndarray, "n m h w c"]
    scores: Float[np.ndarray, "n m *s"]
    numbers: Int[np.ndarray, "m"] | Int[np.ndarray, "n m"]


class Chosen(NamedTuple):
    """One candidate for each of n prompts."""

    latents: Float[np.ndarray, "n h w c"]
    scores: Float[np.ndarray, "n"]
    numbers: Int[np.ndarray, "n"]


def best(candidates: Candidates) -> Chosen:
    """The candidate with the highest score of each prompt; the first of equals."""
    return _at(candidates, candidates.scores.argmax(1))


def mean_ranks(*scores: Float[np.ndarray, "n _ s"]) -> list[Float[np.ndarray, "n _"]]:
    """The rank of each candidate among all of its prompt, the mean over the scorers: 0 the worst of all, 1 the best.

    It is how often a scorer prefers the candidate to another one; even counts half. The first scorer counts a little
    more, so that it decides between candidates that are otherwise even: winner and loser of a pool would else be the
    same. One set may be given as several parts, together of at least two candidates; the ranks are returned likewise.
    """
    whole = np.concatenate(scores, axis=1)
    won = 0.5 + 0.5 * np.sign(whole[:, :, None] - whole[:, None])  # over itself: half
    weights = np.where(np.arange(whole.shape[2]), 1.0, 1.0 + _MORE)
    ranks = (won.sum(2) - 0.5) / (whole.shape[1] - 1) @ (weights / weights.sum())
    return np.split(ranks.astype(np.float32), np.cumsum([part.shape[1] for part in scores])[:-1], axis=1)


def worst(candidates: Candidates) -> Chosen:
    """The candidate with the lowest score of each prompt; the first of equals."""
    return _at(candidates, candidates.scores.argmin(1))


def finalists(scores: Float[np.ndarray, "n m"], each: int) -> Int[np.ndarray, "n k"]:
    """The places of the highest and of the lowest scores of each prompt, so many of both, in rising order."""
    ranked = np.argsort(scores, axis=1, kind="stable")
    return np.sort(np.concatenate([ranked[:, :each], ranked[:, -each:]], axis=1), axis=1)


def apart(candidates: Candidates, gaps: Sequence[int], draws: Integer[np.ndarray, "n"]) -> tuple[Chosen, Chosen]:
    """Winner and loser of each prompt: two candidates whose ranks differ by one of these gaps.

    Args:
        candidates: m of each prompt.
        gaps: see :func:`hgdpo_jax.config.rank_gaps`.
        draws: random numbers, which choose among all such pairs of a prompt.
    """
    ranked = np.argsort(-candidates.scores, axis=1, kind="stable")
    pairs = np.array([(i, i + gap) for gap in gaps for i in range(ranked.shape[1] - gap)])
    places = np.take_along_axis(ranked, pairs[draws % len(pairs)], axis=1)
    return _at(candidates, places[:, 0]), _at(candidates, places[:, 1])


def _at(candidates: Candidates, places: Int[np.ndarray, "n"]) -> Chosen:
    rows = np.arange(len(places))
    numbers = np.broadcast_to(candidates.numbers, candidates.scores.shape)
    return Chosen(candidates.latents[rows, places], candidates.scores[rows, places], numbers[rows, places])
