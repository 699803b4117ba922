"""What the pairs of a stage are made from, and which shards they become."""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from hgdpo_jax import config as configuration
from hgdpo_jax.data import shards
from hgdpo_jax.data.pairs import Pairs
from hgdpo_jax.data.photographs import Photograph, sort_by_shape
from hgdpo_jax.diffusion import pipeline as pipelines
from hgdpo_jax.faces.concepts import encoder_hash
from hgdpo_jax.run import processes, provenance
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import json_hash
from hgdpo_jax.run.index import Index
from hgdpo_jax.run.progress import Progress
from hgdpo_jax.run.settings import named
from hgdpo_jax.scoring.scorers import scorers_hash

Photographs = Mapping[str, Sequence[Photograph]]  # train and heldout


def depends_on(config: ConfigDict) -> list[str]:
    """The settings that decide what the pairs are. Only rounding depends on `pairs.batch`."""
    pairs = config.pairs
    keys = ["seed", "model.dtype", "data.split", "data.mirror", "data.caption_prefix", "data.resolutions"]
    keys += ["pairs.winner", "pairs.loser", "pairs.keep_if_winner_scores_higher", "pairs.shard_size"]
    keys += ["pairs.pool_size"] if "pool" in (pairs.winner, pairs.loser) else []
    keys += ["pairs.policy"] if pairs.policy != "base" else []
    if configuration.has_finalists(config):
        keys += ["pairs.race", "pairs.draft_steps", "pairs.finalists"]
    keys += ["pairs.bucket", "pairs.buckets"] if pairs.bucket else []
    keys += ["pairs.least_gap"] if pairs.least_gap else []
    keys += ["pairs.strengths"] if "sdrecon" in (pairs.winner, pairs.loser) else []
    keys += ["pairs.redraw"] if pairs.redraw != "all" else []
    drawn = bool({"pool", "sdrecon"} & {pairs.winner, pairs.loser})
    keys += ["pairs.sampler", "pairs.steps", "pairs.guidance"] if drawn else []
    keys += ["pairs.negative_prompt"] if drawn and pairs.negative_prompt else []
    keys += ["pairs.guidance_interval"] if drawn and tuple(pairs.guidance_interval) != configuration.ALWAYS else []
    return keys + (["adapter.kind"] if config.train.params == "adapter" else [])


def made_from(config: ConfigDict, photographs: Photographs, earlier: Pairs | None, index: Index) -> dict[str, Any]:
    """What the pairs of a config are made from; see :mod:`hgdpo_jax.run.provenance`."""
    inputs = {
        "model.base": pipelines.base_hash(config.model.base, config.model.vae, config.model.lora, index),
        "captions.jsonl": json_hash({role: [[p.id, p.caption] for p in photographs[role]] for role in photographs}),
    }
    if config.pairs.loser not in ("none", "given"):
        with named("pairs.scorer", config.pairs.scorer):
            inputs["pairs.scorer"] = processes.broadcast(lambda: scorers_hash(config.pairs.scorer, index))
    if earlier:
        inputs[f"the pairs of {config.pairs.loser}"] = earlier.hash
    if config.train.params == "adapter":
        inputs["the concept encoder"] = encoder_hash(config, index)
    return provenance.settings(config, depends_on(config)) | {provenance.content_key(k): v for k, v in inputs.items()}


class ShardPlan(NamedTuple):
    """A shard: its file, train or heldout, the name of its resolution, its photographs."""

    path: Path
    role: str
    resolution: str
    photographs: Sequence[Photograph]


def plan_shards(
    config: ConfigDict,
    folder: Path,
    photographs: Photographs,
    earlier: Pairs | None,
    index: Index,
) -> list[ShardPlan]:
    """All shards of a stage. K: where an earlier stage kept no pair, there is none."""
    plan, size = [], config.pairs.shard_size
    for role, listed in photographs.items():
        kept = earlier.by_id(role) if earlier else {}
        chosen = [p for p in listed if p.id in kept] if earlier else listed
        for name, bucket in sort_by_shape(chosen, configuration.resolutions(config), index).items():
            count = math.ceil(len(bucket) / size)
            for i in range(count):
                path = shards.shard_path(folder, f"{role}_{name}", i, count)
                plan.append(ShardPlan(path, role, name, bucket[i * size : (i + 1) * size]))
    return plan


def group_size(config: ConfigDict) -> int:
    """The prompts of a shard that are made at once: as few as fill whole batches."""
    pairs = config.pairs
    if "pool" not in (pairs.winner, pairs.loser):
        return pairs.batch
    each = [pairs.pool_size] + [2 * pairs.finalists] * configuration.has_finalists(config)
    return math.lcm(*(pairs.batch // math.gcd(pairs.batch, count) for count in each))


def require_captions(plan: Sequence[ShardPlan], earlier: Pairs) -> None:
    """Raises UserError where a photograph's caption is another than its loser was drawn for; reads all records."""
    records = {role: earlier.by_id(role) for role in {part.role for part in plan}}
    listed = [(records[part.role], photograph) for part in plan for photograph in part.photographs]
    for kept, photograph in Progress(listed, desc="captions", unit="record", leave=False):
        before = kept[photograph.id]["caption"]
        if before != photograph.caption:
            raise UserError(
                f"photograph {photograph.id}: its caption was {before!r} when {earlier.folder} was made, and is "
                f"{photograph.caption!r}; give that, or make those pairs in another --workdir"
            )


def shards_to_make(plan: Sequence[ShardPlan], finished: bool, index: Index | None) -> list[int]:
    """Which shards of the plan are to be made. Finished pairs are never made anew: somebody may have learnt from them.

    Args:
        plan: all shards.
        finished: whether all were there once.
        index: of the photographs' content, where their pixels are used.
    """
    whole = [part for part in plan if shards.is_whole(part.path)] if index else []
    if index:
        pictures = [(p.picture, p.loser) for part in whole for p in part.photographs]
        index.learn(file for pair in pictures for file in pair if file is not None)
    todo = []
    for number, part in enumerate(plan):
        if not shards.is_whole(part.path):
            todo.append(number)
        elif not shards.is_made_of(part.path, shards.photographs_of_shard(part.photographs, index)):
            if finished:
                logging.warning("pair shard %s: a photograph that could not be read has changed since; remove the "
                                "shard and run again to take it in", part.path)  # fmt: skip
            else:
                todo.append(number)
    return todo
