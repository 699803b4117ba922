"""Where a stage's winners and losers come from: one class for each kind of winner.

easy     Pool            winner = best of a pool     loser = worst of the pool
normal   Reconstruction  winner = best of t4…t7      loser = easy winner     kept where f(winner) >= f(loser): K
hard     Reconstruction  winner = t1                 loser = normal winner  on K, the ids of the normal stage's shards
naive    Reconstruction  winner = the photograph     loser = the one picture of its pool
given    Given           winner and loser = a pair of data.pairs
sft      WithoutLosers   winner = the photograph     no loser

In every stage ε_base draws the pools and reconstructs the photographs, and f, the scorer, gives the scores. tk is a
photograph noised to timestep 100·k and denoised. K holds the photographs whose pair the normal stage kept.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from hgdpo_jax.curriculum.candidates import Candidates, best, worst
from hgdpo_jax.data.photographs import Photograph
from hgdpo_jax.data.record import LATENT, Record
from hgdpo_jax.diffusion.sampler import ImageFunction, Sampler
from hgdpo_jax.faces.concepts import ConceptEncoder
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.scoring.preference import Scorer

Images = Float[np.ndarray, "n H W 3"]
Finish = Callable[[], list[Record]]


class Group(NamedTuple):
    """n prompts that are drawn, scored and written together.

    Attributes:
        photographs: whose captions are the prompts.
        input_ids: of the captions.
        resolution: (H, W) in pixels.
        images: the photographs in [-1, 1], where the winners use them.
        losers: the losers that are given, likewise.
        earlier: each photograph's record of the stage before, whose winner is the loser here.
    """

    photographs: Sequence[Photograph]
    input_ids: Int[np.ndarray, "n s"]
    resolution: tuple[int, int]
    images: Images | None = None
    losers: Images | None = None
    earlier: Sequence[Record] = ()

    def record(
        self, i: int, winner: np.ndarray, score: float | np.floating = 0.0, number: int | np.integer = 0, **others: Any
    ) -> Record:
        """The record of prompt i with this winner."""
        photograph = self.photographs[i]
        common = {"id": photograph.id, "caption": photograph.caption, "input_ids": self.input_ids[i]}
        won = {"winner": winner.astype(LATENT), "winner_score": np.float32(score), "winner_number": number}
        return common | won | others


class Scored(ABC):
    """Winners that are chosen by their scores, against the worst of a pool or an earlier stage's winner.

    Args:
        settings: the config's `pairs` group.
        sampler: with ε_base.
        scorer: f.
    """

    def __init__(self, settings: ConfigDict, sampler: Sampler, scorer: Scorer) -> None:
        self.settings, self.sampler, self.scorer = settings, sampler, scorer

    @abstractmethod
    def candidates(self, group: Group) -> Candidates:
        """The candidates of each prompt, the best of which wins. Devices may still be computing them on return."""

    def losers(self, group: Group, winners: Candidates) -> Candidates | None:
        """The candidates of each prompt, the worst of which loses; None where an earlier stage's winner does."""
        return self.pool(group) if self.settings.loser == "pool" else None

    def pool(self, group: Group) -> Candidates:
        """N images for each prompt, from different seeds."""
        count = self.settings.pool_size
        numbers, names = np.arange(count), [photograph.id for photograph in group.photographs]
        keys = self.sampler.keys("pool", [name for name in names for _ in numbers], [*range(count)] * len(names))
        ids = np.repeat(group.input_ids, count, axis=0)
        latents, scores = self.sampler.candidates(ids, keys, group.resolution, self._score, "pool")
        return Candidates(latents.reshape(-1, count, *latents.shape[1:]), scores.reshape(-1, count), numbers)

    def _score(self, images: jax.Array, input_ids: jax.Array) -> jax.Array:
        return self.scorer(images, input_ids).score

    def begin(self, group: Group) -> Finish:
        """Starts drawing and scoring a group on the devices.

        Returns:
            A function that waits for them and returns the group's records. It raises UserError, with the prompt's name,
            where a score is not finite.
        """
        winners = self.candidates(group)
        pool = self.losers(group, winners)
        winner, loser = best(winners), worst(pool) if pool else None

        def finish() -> list[Record]:
            for candidates in (pool, winners):
                if candidates is not None:
                    require_finite_scores(np.asarray(candidates.scores), group.photographs, self.settings.scorer)
            won = jax.device_get(winner)
            if loser is not None:
                losers, loser_scores, _ = jax.device_get(loser)
            else:
                losers = [record["winner"] for record in group.earlier]
                loser_scores = [record["winner_score"] for record in group.earlier]
            kept = [*range(len(group.photographs))]
            if self.settings.keep_if_winner_scores_higher:  # K
                kept = [i for i in kept if won.scores[i] >= loser_scores[i]]
            return [
                group.record(
                    i,
                    won.latents[i],
                    won.scores[i],
                    won.numbers[i],
                    loser=losers[i].astype(LATENT),
                    loser_score=loser_scores[i],
                )
                for i in kept
            ]

        return finish


class Pool(Scored):
    """The best of N images that ε_base draws for each prompt."""

    def candidates(self, group: Group) -> Candidates:
        """See :meth:`Scored.pool`."""
        return self.pool(group)

    def losers(self, group: Group, winners: Candidates) -> Candidates | None:
        """The same pool."""
        return winners if self.settings.loser == "pool" else None


class Reconstruction(Scored):
    """The best of a photograph's reconstructions (SDRecon) at some strengths, of which 0 is the photograph itself."""

    def candidates(self, group: Group) -> Candidates:
        """A reconstruction of each photograph at each strength."""
        strengths = self.settings.strengths if self.settings.winner == "sdrecon" else (0,)
        return Candidates(*reconstructions(self.sampler, group, strengths, self._score), np.array(strengths))


def reconstructions(
    sampler: Sampler, group: Group, strengths: Sequence[int], measure: ImageFunction
) -> tuple[Float[Array | np.ndarray, "n m h w c"], Any]:
    """A reconstruction of each photograph of a group at each of m strengths, and what `measure` makes of it."""
    names = [photograph.id for photograph in group.photographs]
    keys = {strength: sampler.keys("sdrecon", names, [strength] * len(names)) for strength in strengths}
    assert group.images is not None
    return sampler.reconstructions(group.images, group.input_ids, keys, measure, "SDRecon")


class Given:
    """Pairs that exist already: both pictures are encoded."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler

    def begin(self, group: Group) -> Finish:
        """Encodes the pictures now, unlike :meth:`Scored.begin`, and returns what makes the records."""
        assert group.images is not None and group.losers is not None
        winners = self.sampler.encode(group.images, "encode")
        losers = self.sampler.encode(group.losers, "encode losers").astype(LATENT)
        pairs = enumerate(zip(winners, losers, strict=True))
        return lambda: [group.record(i, winner, loser=x, loser_score=np.float32(0)) for i, (winner, x) in pairs]


class WithoutLosers:
    """Supervised fine-tuning: photographs to learn from, without losers.

    Args:
        sampler: with the VAE.
        concepts: reads each photograph as a concept image, where an adapter is to be trained.
    """

    def __init__(self, sampler: Sampler, concepts: ConceptEncoder | None = None) -> None:
        self.sampler, self.concepts = sampler, concepts

    def begin(self, group: Group) -> Finish:
        """Encodes the pictures now, unlike :meth:`Scored.begin`, and returns what makes the records.

        A photograph without a face is no concept image, and is left out.
        """
        assert group.images is not None
        latents = self.sampler.encode(group.images, "encode")
        if self.concepts is None:
            return lambda: [group.record(i, latent) for i, latent in enumerate(latents)]
        features, found = self.concepts(group.images)
        for photograph, has_face in zip(group.photographs, found, strict=True):
            if not has_face:
                logging.warning("photograph %s: no face found; left out", photograph.id)
        faces = np.flatnonzero(found).tolist()
        return lambda: [group.record(i, latents[i], concept=features[i].astype(LATENT)) for i in faces]


def images_per_prompt(config: ConfigDict) -> int:
    """How many images are drawn for each prompt, reconstructed, or encoded as they are."""
    pairs = config.pairs
    others = {"pool": 0, "sdrecon": len(pairs.strengths), "given": 2}.get(pairs.winner, 1)
    return others + ("pool" in (pairs.winner, pairs.loser)) * pairs.pool_size


def uses_pixels(config: ConfigDict) -> bool:
    """Whether records are made of photographs, not of their captions alone."""
    return config.pairs.winner != "pool"


def winners_of(
    config: ConfigDict, sampler: Sampler, scorer: Scorer | None, concepts: ConceptEncoder | None
) -> Scored | Given | WithoutLosers:
    """The kind of winner that a config's `pairs` group asks for.

    Args:
        config: of a stage.
        sampler: with ε_base.
        scorer: f, where the winner or the loser is chosen.
        concepts: where an adapter is to be trained.
    """
    if config.pairs.loser == "given":
        return Given(sampler)
    if config.pairs.loser == "none":
        return WithoutLosers(sampler, concepts)
    assert scorer is not None
    return (Pool if config.pairs.winner == "pool" else Reconstruction)(config.pairs, sampler, scorer)


def require_finite_scores(
    scores: Float[np.ndarray, "n *m"], photographs: Sequence[Photograph], scorer_folder: str
) -> None:
    """Raises UserError that names the first of n prompts with a score that is NaN or infinite."""
    broken = ~np.isfinite(scores.reshape(len(photographs), -1)).all(1)
    if broken.any():
        first = photographs[int(np.argmax(broken))]
        raise UserError(f"prompt {first.caption!r} of {first.id}: its score is NaN or infinite; is the scorer "
                        f"{scorer_folder} broken, or does the base's tokenizer have tokens of its own?")  # fmt: skip
