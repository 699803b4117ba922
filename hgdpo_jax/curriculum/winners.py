"""Where a stage's winners and losers come from: one class for each kind of winner.

easy     Pool            winner = best of a pool     loser = worst of the pool; or two of it, by their ranks
normal   Reconstruction  winner = best of t4…t7      loser = easy winner     kept where f(winner) >= f(loser): K
hard     Reconstruction  winner = t1                 loser = normal winner  on K, the ids of the normal stage's shards
naive    Reconstruction  winner = the photograph     loser = the one picture of its pool
                                                      or, of `realalign`, the photograph with its face redrawn
given    Given           winner and loser = a pair of data.pairs
sft      WithoutLosers   winner = the photograph     no loser

In every stage ε_base draws the pools and reconstructs the photographs, and f, the scorer, gives the scores. tk is a
photograph noised to timestep 100·k and denoised. K holds the photographs whose pair the normal stage kept.

Of several scorers, f is the mean rank of a picture among all that are compared for its prompt: the candidates, and the
loser that comes from an earlier stage, which is scored once more.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from hgdpo_jax.config import rank_gaps
from hgdpo_jax.curriculum.boxes import Redrawn
from hgdpo_jax.curriculum.candidates import Candidates, Chosen, apart, best, finalists, mean_ranks, worst
from hgdpo_jax.curriculum.forwards import race_steps
from hgdpo_jax.curriculum.store import Store, key_of
from hgdpo_jax.data.photographs import Photograph
from hgdpo_jax.data.record import LATENT, Record
from hgdpo_jax.diffusion.sampler import ImageFunction, Sampler
from hgdpo_jax.faces.concepts import ConceptEncoder
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.scoring.scorers import Scorer

Images = Float[np.ndarray, "n H W 3"]
Finish = Callable[[], list[Record]]
Pending = Callable[[], Candidates]  # waits for the devices; raises UserError where a score is not finite
# Latents [n m h w c], scores [n m], perhaps not computed yet; numbers.
Made = tuple[Array | np.ndarray, Array | np.ndarray, np.ndarray]


class Group(NamedTuple):
    """n prompts that are drawn, scored and written together.

    Attributes:
        photographs: whose captions are the prompts.
        input_ids: of the captions.
        resolution: (H, W) in pixels.
        images: the photographs in [-1, 1], where the winners use them.
        losers: the losers that are given, likewise.
        earlier: each photograph's record of the stage before, whose winner is the loser here.
        redrawn: 1 in the cells of a latent that SDRecon redraws of each photograph, if not all.
    """

    photographs: Sequence[Photograph]
    input_ids: Int[np.ndarray, "n s"]
    resolution: tuple[int, int]
    images: Images | None = None
    losers: Images | None = None
    earlier: Sequence[Record] = ()
    redrawn: Float[np.ndarray, "n h w 1"] | None = None

    def only(self, rows: Sequence[int]) -> "Group":
        """The group of some of its prompts."""
        if len(rows) == len(self.photographs):
            return self
        arrays = {name: getattr(self, name) for name in ("input_ids", "images", "losers", "redrawn")}
        lists = {name: getattr(self, name) for name in ("photographs", "earlier")}
        chosen: dict[str, Any] = {name: x[list(rows)] for name, x in arrays.items() if x is not None}
        chosen |= {name: [x[row] for row in rows] for name, x in lists.items() if x}
        return self._replace(**chosen)

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
        scorers: f, or several.
        store: keeps candidates for other stages, if any.
    """

    def __init__(
        self, settings: ConfigDict, sampler: Sampler, scorers: Sequence[Scorer], store: Store | None = None
    ) -> None:
        self.settings, self.sampler, self.scorers, self.store = settings, sampler, scorers, store
        self.find = None if settings.redraw == "all" else Redrawn(settings.redraw)

    @abstractmethod
    def candidates(self, group: Group) -> Pending:
        """The candidates of each prompt, the best of which wins."""

    def losers(self, group: Group) -> Pending | None:
        """The candidates of each prompt, the worst of which loses; None where they are those that the winner is of, or
        where an earlier stage's winner loses, with the score that it has."""
        if self.settings.loser == "sdrecon":
            return self.reconstructed(group, self.settings.strengths)
        if self.settings.loser == "pool":
            return self.pool(group)
        return partial(self._earlier, group) if len(self.scorers) > 1 else None

    def pool(self, group: Group) -> Pending:
        """N images for each prompt, from different seeds."""

        def draw(group: Group, numbers: Sequence[int]) -> Made:
            ids, keys = self._inputs(group, numbers)
            latents, scores = self.sampler.candidates(ids, keys, group.resolution, self._score, "pool")
            return *_by_prompt(group, latents, scores), np.array(numbers)

        return self._made("pool", group._replace(images=None), range(self.settings.pool_size), draw)

    def _inputs(self, group: Group, numbers: Sequence[int]) -> tuple[np.ndarray, Any]:
        """Captions and keys of a pool's pictures, prompt by prompt."""
        names = [photograph.id for photograph in group.photographs]
        keys = self.sampler.keys("pool", [name for name in names for _ in numbers], [*numbers] * len(names))
        return np.repeat(group.input_ids, len(numbers), axis=0), keys

    def reconstructed(self, group: Group, strengths: Sequence[int]) -> Pending:
        """A reconstruction of each photograph at each strength (SDRecon), of which 0 is the photograph itself."""

        def make(group: Group, strengths: Sequence[int]) -> Made:
            return *reconstructions(self.sampler, group, strengths, self._score), np.array(strengths)

        kind = "sdrecon" if group.redrawn is None else f"sdrecon of the {self.settings.redraw}"
        return self._made(kind, group, strengths, make)

    def _score(self, images: jax.Array, input_ids: jax.Array) -> jax.Array:
        """[b] of one scorer, [b s] of several."""
        scores = [jnp.asarray(scorer.score(images, input_ids)) for scorer in self.scorers]
        return scores[0] if len(scores) == 1 else jnp.stack(scores, axis=-1)

    def _earlier(self, group: Group) -> Candidates:
        """The winners of the stage before, scored again."""
        latents = np.stack([record["winner"] for record in group.earlier]).astype(np.float32)
        scores = self.sampler.measure_latents(latents, group.input_ids, self._score, "losers")
        require_finite_scores(scores, group.photographs, self.settings.scorer)
        return Candidates(latents[:, None], scores[:, None], np.zeros(1, np.int32))

    def _made(
        self, kind: str, group: Group, numbers: Sequence[int], make: Callable[[Group, Sequence[int]], Made]
    ) -> Pending:
        """Gives the devices what is missing of each prompt's candidates.

        Args:
            kind: of the candidates, see :func:`hgdpo_jax.curriculum.store.key_of`.
            group: with the pixels of its photographs, where candidates depend on them.
            numbers: of each prompt's candidates.
            make: those of a group, or of a part of it, their scores and numbers.
        """
        rows, lacking, keys = [*range(len(group.photographs))], [*numbers], list[str]()
        if self.store:
            images = [None] * len(rows) if group.images is None else group.images
            described = zip(group.photographs, images, strict=True)
            keys = [key_of(kind, photograph, group.resolution, image) for photograph, image in described]
            rows, lacking = self.store.missing(keys, numbers)
        part = group.only(rows)
        devices = make(part, lacking) if rows else None

        def finish() -> Candidates:
            if devices:
                latents, scores, made_numbers = jax.device_get(devices)
                require_finite_scores(scores, part.photographs, self.settings.scorer)
                made = Candidates(latents.astype(LATENT), scores, made_numbers)
            if self.store is None:
                return made
            if devices:
                self.store.add([keys[row] for row in rows], made)
            self.store.read += len(keys) * len(numbers) - len(rows) * len(lacking)
            return self.store.take(keys, numbers)

        return finish

    def _with_faces(self, group: Group) -> Group:
        """The photographs of a group that have a face, with what is redrawn of them."""
        assert group.images is not None and self.find is not None
        masks, found = self.find(group.images, *self.sampler.latent_shape(group.resolution)[:2])
        warn_of_faceless(group.photographs, found)
        return group._replace(redrawn=masks).only(np.flatnonzero(found).tolist())

    def pick(self, group: Group, candidates: Candidates, losers: Candidates) -> tuple[Chosen, Chosen]:
        """Winner and loser of each prompt."""
        return best(candidates), worst(losers)

    def begin(self, group: Group) -> Finish:
        """Starts drawing and scoring a group on the devices.

        Returns:
            A function that waits for them and returns the group's records. It raises UserError, with the prompt's name,
            where a score is not finite.
        """
        if self.settings.redraw != "all":
            group = self._with_faces(group)
            if not group.photographs:
                return list
        winners, others = self.candidates(group), self.losers(group)

        def finish() -> list[Record]:
            candidates = winners()
            rivals = others() if others else candidates
            if len(self.scorers) > 1:
                candidates, rivals = _ranked(candidates, rivals)
            won, (losers, loser_scores, _) = self.pick(group, candidates, rivals)
            if others is None and group.earlier:
                losers = np.stack([record["winner"] for record in group.earlier])
                loser_scores = np.array([record["winner_score"] for record in group.earlier])
            kept = [*range(len(group.photographs))]
            if self.settings.keep_if_winner_scores_higher:  # K
                kept = [i for i in kept if won.scores[i] - loser_scores[i] >= self.settings.least_gap]
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


def _ranked(winners: Candidates, losers: Candidates) -> tuple[Candidates, Candidates]:
    """The same candidates with ranks for scores, see :func:`mean_ranks`; both may be the same pool."""
    if winners is losers:
        ranked = winners._replace(scores=mean_ranks(winners.scores)[0])
        return ranked, ranked
    of_winners, of_losers = mean_ranks(winners.scores, losers.scores)
    return winners._replace(scores=of_winners), losers._replace(scores=of_losers)


class Pool(Scored):
    """The best of N images that ε_base draws for each prompt."""

    def candidates(self, group: Group) -> Pending:
        """See :meth:`Scored.pool`; or only those of it that may be best or worst."""
        draw = self._raced if self.settings.race else self._drafted if self.settings.draft_steps else None
        return self._made("pool", group, range(self.settings.pool_size), draw) if draw else self.pool(group)

    def _raced(self, group: Group, numbers: Sequence[int]) -> Made:
        """Those whose predicted pictures are ahead or behind after a part of the steps, drawn on to the end."""
        (ids, keys), steps = self._inputs(group, numbers), race_steps(self.settings)
        start = self.sampler.start(len(ids), group.resolution)
        (x, x_0), scores = self.sampler.part_way(ids, keys, start, (0, steps), self._score, "pool, first steps")
        go_on = self._finalists(group, scores)
        rows = go_on.ravel()
        state = x[rows], x_0[rows]
        made = self.sampler.rest(ids[rows], keys[rows], state, steps, self._score, "pool, last steps")
        return *_by_prompt(group, *made), go_on % len(numbers)

    def _drafted(self, group: Group, numbers: Sequence[int]) -> Made:
        """Those that are ahead or behind when drawn in few steps, drawn again in all of them from the same noise."""
        ids, keys = self._inputs(group, numbers)
        drafts, size = self.settings.draft_steps, group.resolution
        go_on = self._finalists(group, self.sampler.drafts(ids, keys, size, drafts, self._score, "pool, drafts"))
        rows = go_on.ravel()
        made = self.sampler.candidates(ids[rows], keys[rows], size, self._score, "pool")
        return *_by_prompt(group, *made), go_on % len(numbers)

    def _finalists(self, group: Group, scores: Float[np.ndarray, "..."]) -> Int[np.ndarray, "n k"]:
        """The rows of those that go on, prompt by prompt."""
        require_finite_scores(scores, group.photographs, self.settings.scorer)
        scores = scores.reshape(len(group.photographs), -1, *scores.shape[1:])
        found = finalists(mean_ranks(scores)[0] if len(self.scorers) > 1 else scores, self.settings.finalists)
        return found + self.settings.pool_size * np.arange(len(found))[:, None]

    def losers(self, group: Group) -> Pending | None:
        """Of the same pool, or see :meth:`Scored.losers`."""
        return None if self.settings.loser == "pool" else super().losers(group)

    def pick(self, group: Group, candidates: Candidates, losers: Candidates) -> tuple[Chosen, Chosen]:
        """Best and worst, or two whose ranks are as far apart as `pairs.bucket` says."""
        settings, count = self.settings, len(group.photographs)
        if not settings.bucket:
            return best(candidates), worst(losers)
        names = [photograph.id for photograph in group.photographs]
        keys = self.sampler.keys("bucket", names, [settings.bucket] * count)
        gaps = rank_gaps(len(candidates.numbers), settings.bucket, settings.buckets)
        return apart(candidates, gaps, np.asarray(jax.random.key_data(keys))[:, 1])


class Reconstruction(Scored):
    """The best of a photograph's reconstructions, or the photograph itself."""

    def candidates(self, group: Group) -> Pending:
        """A reconstruction of each photograph at each strength."""
        return self.reconstructed(group, self.settings.strengths if self.settings.winner == "sdrecon" else (0,))


def _by_prompt(group: Group, latents: Any, scores: Any) -> tuple[Any, Any]:
    n = len(group.photographs)
    return latents.reshape(n, -1, *latents.shape[1:]), scores.reshape(n, -1, *scores.shape[1:])


def reconstructions(
    sampler: Sampler, group: Group, strengths: Sequence[int], measure: ImageFunction
) -> tuple[Float[Array | np.ndarray, "n m h w c"], Any]:
    """A reconstruction of each photograph of a group at each of m strengths, and what `measure` makes of it."""
    names = [photograph.id for photograph in group.photographs]
    keys = {strength: sampler.keys("sdrecon", names, [strength] * len(names)) for strength in strengths}
    assert group.images is not None
    return sampler.reconstructions(group.images, group.input_ids, keys, measure, "SDRecon", group.redrawn)


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
        warn_of_faceless(group.photographs, found)
        faces = np.flatnonzero(found).tolist()
        return lambda: [group.record(i, latents[i], concept=features[i].astype(LATENT)) for i in faces]


def warn_of_faceless(photographs: Sequence[Photograph], found: Bool[np.ndarray, "n"]) -> None:
    """Names the photographs in which no face was found."""
    for photograph, has_face in zip(photographs, found, strict=True):
        if not has_face:
            logging.warning("photograph %s: no face found; left out", photograph.id)


def images_per_prompt(config: ConfigDict) -> int:
    """How many images are drawn for each prompt, reconstructed, or encoded as they are."""
    pairs = config.pairs
    others = {"pool": 0, "sdrecon": len(pairs.strengths), "given": 2}.get(pairs.winner, 1)
    others += len(pairs.strengths) * (pairs.loser == "sdrecon")
    return others + ("pool" in (pairs.winner, pairs.loser)) * pairs.pool_size


def uses_pixels(config: ConfigDict) -> bool:
    """Whether records are made of photographs, not of their captions alone."""
    return config.pairs.winner != "pool"


def winners_of(
    config: ConfigDict,
    sampler: Sampler,
    scorers: Sequence[Scorer],
    concepts: ConceptEncoder | None,
    store: Store | None = None,
) -> Scored | Given | WithoutLosers:
    """The kind of winner that a config's `pairs` group asks for.

    Args:
        config: of a stage.
        sampler: with ε_base.
        scorers: f, or several, where the winner or the loser is chosen.
        concepts: where an adapter is to be trained.
        store: keeps candidates for other stages, if any.
    """
    if config.pairs.loser == "given":
        return Given(sampler)
    if config.pairs.loser == "none":
        return WithoutLosers(sampler, concepts)
    return (Pool if config.pairs.winner == "pool" else Reconstruction)(config.pairs, sampler, scorers, store)


def require_finite_scores(scores: Float[np.ndarray, "n *m"], photographs: Sequence[Photograph], scorers: str) -> None:
    """Raises UserError that names the first of n prompts with a score that is NaN or infinite."""
    broken = ~np.isfinite(scores.reshape(len(photographs), -1)).all(1)
    if broken.any():
        first = photographs[int(np.argmax(broken))]
        raise UserError(f"prompt {first.caption!r} of {first.id}: its score is NaN or infinite; is the scorer "
                        f"{scorers} broken, or does the base's tokenizer have tokens of its own?")  # fmt: skip
