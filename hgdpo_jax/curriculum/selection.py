"""What a stage is: where its winners and losers come from, as the config's `pairs` group says.

easy     winner = best of the pool          loser = worst of the pool
normal   winner = best of t4…t7             loser = easy winner         kept where f(winner) >= f(loser): K
hard     winner = t1                        loser = normal winner       on K, the ids of the normal stage's shards
given    winner and loser = a pair of data.pairs
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from hgdpo_jax.data.photographs import Photograph
from hgdpo_jax.data.record import Record
from hgdpo_jax.diffusion.sampler import ImageFunction, Sampler
from hgdpo_jax.faces.concepts import ConceptEncoder
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.scoring.preference import Scorer


class Candidates(NamedTuple):
    """m latents for each of n prompts, their scores, and their numbers (in the pool, or strengths)."""

    latents: Float[Array, "n m h w c"]
    scores: Float[Array, "n m"]
    numbers: Int[Array, "m"]


class Chosen(NamedTuple):
    """One candidate for each of n prompts."""

    latents: Float[Array, "n h w c"]
    scores: Float[Array, "n"]
    numbers: Int[Array, "n"]


@jax.jit
def best(candidates: Candidates) -> Chosen:
    """Of each prompt the candidate with the highest score."""
    index = candidates.scores.argmax(1)
    # Row by row: each device chooses among its own.
    latents, scores = (jax.vmap(lambda row, i: row[i])(x, index) for x in (candidates.latents, candidates.scores))
    return Chosen(latents, scores, candidates.numbers[index])


@jax.jit
def worst(candidates: Candidates) -> Chosen:
    """Of each prompt the candidate with the lowest score."""
    chosen = best(candidates._replace(scores=-candidates.scores))
    return chosen._replace(scores=-chosen.scores)


def pool(
    sampler: Sampler, scorer: Scorer, names: Sequence[str], ids: np.ndarray, size: int, resolution: tuple[int, int]
) -> Candidates:
    """`size` images for each prompt, from different seeds; whole batches stay on the devices and are not waited for."""
    numbers = np.arange(size)
    keys = sampler.keys("pool", [name for name in names for _ in numbers], [int(n) for _ in names for n in numbers])
    latents, scores = sampler.candidates(np.repeat(ids, size, axis=0), keys, resolution, _score(scorer), "pool")
    return Candidates(latents.reshape(-1, size, *latents.shape[1:]), scores.reshape(-1, size), numbers)


def reconstructions(
    sampler: Sampler,
    scorer: Scorer,
    names: Sequence[str],
    ids: np.ndarray,
    images: np.ndarray,
    strengths: Sequence[int],
) -> Candidates:
    """SDRecon of each photograph at each strength, of which 0 is the photograph itself; as in :func:`pool`."""
    keys = {strength: sampler.keys("sdrecon", names, [strength] * len(names)) for strength in strengths}
    return Candidates(*sampler.reconstructions(images, ids, keys, _score(scorer), "SDRecon"), np.array(strengths))


def _score(scorer: Scorer) -> ImageFunction:
    return lambda images, input_ids: scorer(images, input_ids).score


def uses_pixels(config: ConfigDict) -> bool:
    """Whether records are made of photographs, not of their captions alone."""
    return config.pairs.winner != "pool"


def require_finite(scores: Float[np.ndarray, "n *m"], photographs: Sequence[Photograph], scorer: str) -> None:
    """Raises UserError that names the first of n prompts with a score that is no number."""
    broken = ~np.isfinite(scores.reshape(len(photographs), -1)).all(1)
    if broken.any():
        first = photographs[int(broken.argmax())]
        raise UserError(f"prompt {first.caption!r} of {first.id}: its score is NaN or infinite; is the scorer {scorer} "
                        "broken, or does the base's tokenizer have tokens of its own?")  # fmt: skip


def begin_records(
    config: ConfigDict,
    sampler: Sampler,
    scorer: Scorer | None,
    photographs: Sequence[Photograph],
    images: np.ndarray | None,
    resolution: tuple[int, int],
    tokenize: Any,
    earlier: Mapping[str, Record],
    concepts: ConceptEncoder | None = None,
    losers: np.ndarray | None = None,
) -> Callable[[], list[Record]]:
    """Gives the devices what the records of some photographs need, and returns what waits for it and makes them.

    Args:
        config: the whole config; `pairs` is read.
        sampler: with ε_base.
        scorer: f; None where neither winner nor loser is chosen.
        photographs: of one shard.
        images: their pixels float32 [n, H, W, 3] in [-1, 1], where :func:`uses_pixels`.
        resolution: (H, W).
        tokenize: captions → token ids.
        earlier: id → record of the stage that losers come from; empty where they come from the pool.
        losers: pixels of the losers, where pairs are given.
        concepts: reads the photograph as a concept image, where an adapter is to be trained.

    Raises:
        UserError: a score is not finite; the prompt is named.
    """
    settings = config.pairs
    if not photographs:
        return list
    names = [p.id for p in photographs]
    ids = tokenize([p.caption for p in photographs])
    common = [{"id": p.id, "caption": p.caption, "input_ids": row} for p, row in zip(photographs, ids, strict=True)]

    if settings.loser == "none":
        assert images is not None
        latents = sampler.encode(images, "encode")
        records = [
            c | {"winner_number": 0, "winner_score": np.float32(0), "winner": _stored(x)}
            for c, x in zip(common, latents, strict=True)
        ]
        if concepts:
            features, found = concepts(images)
            for name, has_face in zip(names, found, strict=True):
                if not has_face:
                    logging.warning("photograph %s: no face found; left out", name)
            records = [r | {"concept": _stored(x)} for r, x, f in zip(records, features, found, strict=True) if f]
        return lambda: records

    if settings.loser == "given":
        assert images is not None and losers is not None
        both = sampler.encode(images, "encode"), sampler.encode(losers, "encode losers")
        unscored = {"winner_number": 0, "winner_score": np.float32(0), "loser_score": np.float32(0)}
        rows = zip(common, *both, strict=True)
        records = [c | unscored | {"winner": _stored(x), "loser": _stored(y)} for c, x, y in rows]
        return lambda: records

    assert scorer is not None
    drawn_before = [earlier[name] for name in names] if settings.loser != "pool" else []
    pooled = None
    if "pool" in (settings.winner, settings.loser):
        pooled = pool(sampler, scorer, names, ids, settings.pool_size, resolution)
    winners = pooled
    if settings.winner != "pool":
        assert images is not None
        strengths = settings.strengths if settings.winner == "sdrecon" else (0,)
        winners = reconstructions(sampler, scorer, names, ids, images, strengths)
    assert winners is not None
    winner, drawn_loser = best(winners), worst(pooled) if pooled else None

    def finish() -> list[Record]:
        for candidates in (pooled, winners):
            if candidates:
                require_finite(np.asarray(candidates.scores), photographs, settings.scorer)
        won = jax.device_get(winner)
        if settings.loser == "pool":
            loser_latents, loser_scores, _ = jax.device_get(drawn_loser)
        else:
            role = "loser" if settings.loser.endswith("/loser") else "winner"
            loser_latents = np.stack([record[role] for record in drawn_before])
            loser_scores = np.array([record[f"{role}_score"] for record in drawn_before])
        records = []
        for i, record in enumerate(common):
            if settings.keep_if_winner_scores_higher and won.scores[i] < loser_scores[i]:
                continue
            record |= {
                "winner": _stored(won.latents[i]),
                "winner_score": won.scores[i],
                "winner_number": won.numbers[i],
            }
            records.append(record | {"loser": _stored(loser_latents[i]), "loser_score": loser_scores[i]})
        return records

    return finish


def _stored(latent: np.ndarray) -> np.ndarray:
    return latent.astype(np.float16)
