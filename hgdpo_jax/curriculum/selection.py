"""What a stage is: where its winners and losers come from, as the config's `pairs` group says.

easy     winner = best of the pool          loser = worst of the pool
normal   winner = best of t4…t7             loser = easy winner         kept where f(winner) >= f(loser): K
hard     winner = t1                        loser = normal winner       on K, the ids of the normal stage's shards
given    winner and loser = a pair of data.pairs
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from hgdpo_jax.data.concepts import ConceptEncoder
from hgdpo_jax.data.pairs import Record
from hgdpo_jax.data.photographs import Photograph
from hgdpo_jax.diffusion.painter import Painter
from hgdpo_jax.errors import UserError
from hgdpo_jax.scoring.preference import Scorer


class Candidates(NamedTuple):
    """m latents for each of n prompts, their scores, and their numbers (in the pool, or strengths)."""

    latents: Float[np.ndarray, "n m h w c"]
    scores: Float[np.ndarray, "n m"]
    numbers: Int[np.ndarray, "m"]

    def pick(self, index: Int[np.ndarray, "n"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(latents, scores, numbers), one candidate for each prompt."""
        rows = np.arange(len(index))
        return self.latents[rows, index], self.scores[rows, index], self.numbers[index]


def _scored(painter: Painter, scorer: Scorer, latents: np.ndarray, ids: np.ndarray, numbers: np.ndarray) -> Candidates:
    """Candidates of n·m latents, prompt by prompt."""
    scores = painter.measure(
        latents, {"input_ids": ids}, lambda images, input_ids: scorer(images, input_ids).score, "scores"
    )
    m = len(numbers)
    return Candidates(latents.reshape(-1, m, *latents.shape[1:]), scores.reshape(-1, m), numbers)


def pool(
    painter: Painter, scorer: Scorer, names: Sequence[str], ids: np.ndarray, size: int, resolution: tuple[int, int]
) -> Candidates:
    """`size` images for each prompt, from different seeds."""
    numbers = np.arange(size)
    keys = painter.keys("pool", [name for name in names for _ in numbers], [int(n) for _ in names for n in numbers])
    repeated = np.repeat(ids, size, axis=0)
    latents = painter.generate(repeated, keys, resolution, "pool")
    return _scored(painter, scorer, latents, repeated, numbers)


def reconstructions(
    painter: Painter, scorer: Scorer, names: Sequence[str], ids: np.ndarray, encoded: np.ndarray, strengths: Any
) -> Candidates:
    """SDRecon of each photograph's latent [n, h, w, c] at each strength."""
    parts = [
        painter.reconstruct(encoded, ids, painter.keys("sdrecon", names, [s] * len(names)), s, f"SDRecon t{s}")
        for s in strengths
    ]
    latents = np.stack(parts, axis=1).reshape(-1, *encoded.shape[1:])
    return _scored(painter, scorer, latents, np.repeat(ids, len(strengths), axis=0), np.array(strengths))


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


def make_records(
    config: ConfigDict,
    painter: Painter,
    scorer: Scorer | None,
    photographs: Sequence[Photograph],
    images: np.ndarray | None,
    resolution: tuple[int, int],
    tokenize: Any,
    earlier: Mapping[str, Record],
    concepts: ConceptEncoder | None = None,
    losers: np.ndarray | None = None,
) -> list[Record]:
    """The records of some photographs.

    Args:
        config: the whole config; `pairs` is read.
        painter: with ε_base.
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
        return []
    names = [p.id for p in photographs]
    ids = tokenize([p.caption for p in photographs])
    common = [{"id": p.id, "caption": p.caption, "input_ids": row} for p, row in zip(photographs, ids, strict=True)]

    if settings.loser == "none":
        assert images is not None
        latents = painter.encode(images, "encode")
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
        return records

    if settings.loser == "given":
        assert images is not None and losers is not None
        both = painter.encode(images, "encode"), painter.encode(losers, "encode losers")
        unscored = {"winner_number": 0, "winner_score": np.float32(0), "loser_score": np.float32(0)}
        rows = zip(common, *both, strict=True)
        return [c | unscored | {"winner": _stored(x), "loser": _stored(y)} for c, x, y in rows]

    assert scorer is not None
    pooled = None
    if "pool" in (settings.winner, settings.loser):
        pooled = pool(painter, scorer, names, ids, settings.pool_size, resolution)
        require_finite(pooled.scores, photographs, settings.scorer)
    if settings.winner == "pool":
        assert pooled is not None
        winners = pooled
    else:
        assert images is not None
        encoded = painter.encode(images, "encode")
        if settings.winner == "photograph":
            winners = _scored(painter, scorer, encoded, ids, np.zeros(1, int))
        else:
            winners = reconstructions(painter, scorer, names, ids, encoded, settings.strengths)
        require_finite(winners.scores, photographs, settings.scorer)
    winner = winners.pick(winners.scores.argmax(1))
    if settings.loser == "pool":
        assert pooled is not None
        loser_latents, loser_scores, _ = pooled.pick(pooled.scores.argmin(1))
    else:
        role = "loser" if settings.loser.endswith("/loser") else "winner"
        loser_latents = np.stack([earlier[name][role] for name in names])
        loser_scores = np.array([earlier[name][f"{role}_score"] for name in names])
    records = []
    for i, record in enumerate(common):
        if settings.keep_if_winner_scores_higher and winner[1][i] < loser_scores[i]:
            continue
        record |= {"winner": _stored(winner[0][i]), "winner_score": winner[1][i], "winner_number": winner[2][i]}
        records.append(record | {"loser": _stored(loser_latents[i]), "loser_score": loser_scores[i]})
    return records


def _stored(latent: np.ndarray) -> np.ndarray:
    return latent.astype(np.float16)
