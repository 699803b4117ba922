"""Builds the pair shards of a stage: candidates from ε_base, their scores, winners and losers."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from hgdpo_jax import config as configuration
from hgdpo_jax.curriculum.selection import begin_records, uses_pixels
from hgdpo_jax.data import shards
from hgdpo_jax.data.pairs import Pairs, open_stage
from hgdpo_jax.data.photographs import Photograph, list_examples, load_images, load_losers, sort_by_shape
from hgdpo_jax.data.record import features
from hgdpo_jax.devices.mesh import describe_mesh, local_mesh
from hgdpo_jax.devices.sharding import parameter_placer
from hgdpo_jax.devices.transfer import one_ahead
from hgdpo_jax.diffusion import pipeline as pipelines
from hgdpo_jax.diffusion.sampler import Sampler
from hgdpo_jax.faces.concepts import encoder_hash, encoder_of
from hgdpo_jax.models.convert import folder_hash
from hgdpo_jax.run import processes, provenance
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import json_hash
from hgdpo_jax.run.folder import require_plain
from hgdpo_jax.run.index import Index, first_process_first, index_of_run
from hgdpo_jax.run.locks import lock_for_all
from hgdpo_jax.scoring.preference import Scorer

Pixels = tuple[Sequence[Photograph], np.ndarray | None, np.ndarray | None]
_COUNTED = 5000  # captions, at least, whose tokens are counted at the start


def depends_on(config: ConfigDict) -> list[str]:
    """The settings that decide what the pairs are. Only rounding depends on `pairs.batch`."""
    pairs = config.pairs
    keys = ["seed", "model.dtype", "data.split", "data.mirror", "data.resolutions", "pairs.winner", "pairs.loser"]
    keys += ["pairs.keep_if_winner_scores_higher", "pairs.shard_size"]
    keys += ["pairs.pool_size"] if "pool" in (pairs.winner, pairs.loser) else []
    keys += ["pairs.strengths"] if pairs.winner == "sdrecon" else []
    drawn = pairs.winner not in ("photograph", "given") or pairs.loser == "pool"
    keys += ["pairs.sampler", "pairs.steps", "pairs.guidance"] if drawn else []
    keys += ["pairs.negative_prompt"] if drawn and pairs.negative_prompt else []
    return keys + (["adapter.kind"] if config.train.params == "adapter" else [])


def made_from(
    config: ConfigDict, photographs: Mapping[str, Sequence[Photograph]], earlier: Pairs | None, index: Index
) -> dict[str, Any]:
    """What the pairs of a config are made from; see :mod:`hgdpo_jax.run.provenance`."""
    inputs = {
        "model.base": pipelines.base_hash(config.model.base, config.model.vae, config.model.lora, index),
        "captions.jsonl": json_hash({role: [[p.id, p.caption] for p in photographs[role]] for role in photographs}),
    }
    if config.pairs.loser not in ("none", "given"):
        inputs["pairs.scorer"] = processes.broadcast(lambda: folder_hash(config.pairs.scorer, index))
    if earlier:
        inputs[f"the pairs of {config.pairs.loser.partition('/')[0]}"] = earlier.hash
    if config.train.params == "adapter":
        inputs["the concept encoder"] = encoder_hash(config, index)
    return provenance.settings(config, depends_on(config)) | {provenance.content_key(k): v for k, v in inputs.items()}


def build(config: ConfigDict, workdir: Path) -> None:
    """Builds all shards of `config.stage` that are not there yet.

    Raises:
        UserError: an input is missing or broken, the folder holds shards of other settings or inputs, or another
            command is building them.
    """
    if config.train.pairs:
        raise UserError(f"{config.stage} learns from the pairs of {config.train.pairs}: build those")
    require_plain(workdir)
    folder, index = workdir / config.stage / "pairs", index_of_run(workdir)
    loser = config.pairs.loser
    earlier = open_stage(workdir, loser.partition("/")[0], index) if loser.startswith("stage") else None
    listed = first_process_first(index, lambda: list_examples(config, config.data.split, "heldout", index=index))
    photographs = dict(zip(("train", "heldout"), listed, strict=True))
    if loser not in ("none", "given") and not config.pairs.scorer:
        raise UserError("config key pairs.scorer: is empty; set it to the folder of a CLIPModel such as PickScore v1")
    inputs = made_from(config, photographs, earlier, index)
    if earlier:
        earlier.require_from({name: inputs[provenance.content_key(name)] for name in ("model.base", "pairs.scorer")})
    with lock_for_all(folder):
        plan = first_process_first(index, lambda: _plan(config, folder, photographs, earlier, index))
        if earlier and not earlier.is_from({"captions.jsonl": inputs[provenance.content_key("captions.jsonl")]}):
            processes.broadcast(lambda: _require_captions(plan, earlier))
        if not plan:
            raise UserError(f"photographs {config.data.photographs}: none has a pair in {earlier.folder}, from where "
                            f"{loser} takes the losers; give those that it was built from")  # fmt: skip
        finished = processes.broadcast(lambda: shards.begin(folder, inputs))
        todo = processes.broadcast(lambda: _todo(plan, finished, index if uses_pixels(config) else None))
        if finished and not todo:
            print(f"{folder}: already built")
        else:
            mine = [plan[number] for number in todo[jax.process_index() :: jax.process_count()]]
            _make(config, plan, mine, earlier, index)
        index.save()
    done = open_stage(workdir, config.stage, index)
    index.save()
    for role, sources in done.sources.items():
        found = sum(map(len, sources))
        print(f"{folder}: {found} of {len(photographs[role])} {role} photographs have a pair")


class ShardPlan(NamedTuple):
    """A shard: its file, train or heldout, the name of its resolution, its photographs."""

    path: Path
    role: str
    resolution: str
    photographs: Sequence[Photograph]


class Group(NamedTuple):
    """Some prompts of a shard, from `begin` on; where they are written, what they are made of, and their pixels, which
    are being read; None where they are there."""

    part: ShardPlan
    begin: int
    path: Path
    examples: list[shards.ShardPhotograph]
    pixels: Future[Pixels] | None


def _plan(
    config: ConfigDict,
    folder: Path,
    photographs: Mapping[str, Sequence[Photograph]],
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


def _require_captions(plan: Sequence[ShardPlan], earlier: Pairs) -> None:
    """Raises UserError where a photograph's caption is another than its loser was drawn for; reads all records."""
    records = {role: earlier.by_id(role) for role in {part.role for part in plan}}
    listed = [(records[part.role], photograph) for part in plan for photograph in part.photographs]
    for kept, photograph in tqdm(listed, desc="captions", unit="record", leave=False):
        before = kept[photograph.id]["caption"]
        if before != photograph.caption:
            raise UserError(
                f"photograph {photograph.id}: its caption was {before!r} when {earlier.folder} was made, and is "
                f"{photograph.caption!r}; give that, or make those pairs in another --workdir"
            )


def _todo(plan: Sequence[ShardPlan], finished: bool, index: Index | None) -> list[int]:
    """Which shards of the plan are to be made. Finished pairs are never made anew: somebody may have learnt from them.

    Args:
        plan: all shards.
        finished: whether all were there once.
        index: of the photographs' content, where their pixels are used.
    """
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


def _make(
    config: ConfigDict, plan: Sequence[ShardPlan], todo: Sequence[ShardPlan], earlier: Pairs | None, index: Index
) -> None:
    """Makes shards and, once all of the plan are there, the manifest."""
    settings, resolutions = config.pairs, configuration.resolutions(config)
    mesh, dtype = local_mesh(), config.model.dtype
    print(f"{config.stage} pairs: {describe_mesh(mesh)}, {settings.batch} images at a time")
    pipeline = pipelines.load_pipeline(
        config.model.base,
        dtype,
        vae=config.model.vae,
        lora=config.model.lora,
        param_dtype=dtype,
        place=parameter_placer(mesh),
    )
    sampler = Sampler.from_config(pipeline, mesh, settings, config.seed)
    _warn_of_long(pipeline, [photograph for part in plan for photograph in part.photographs])
    scorer = Scorer(settings.scorer, mesh) if settings.loser not in ("none", "given") else None
    concepts = encoder_of(config) if config.train.params == "adapter" else None
    tokens = pipeline.tokenize([""]).shape[1]
    latents = {name: pipeline.latent_shape(resolution) for name, resolution in resolutions.items()}
    if earlier:
        earlier.require(latents)
    concept = concepts.nothing.shape[1:] if concepts else None
    schema = features(next(iter(latents.values()))[2], tokens, settings.loser != "none", concept)
    records = {role: earlier.by_id(role) if earlier else {} for role in {part.role for part in todo}}
    content = index if uses_pixels(config) else None
    size = _group_size(settings)
    groups = [(part, begin) for part in todo for begin in range(0, len(part.photographs), size)]

    def read(part: ShardPlan, begin: int) -> Group:
        photographs = part.photographs[begin : begin + size]
        examples, path = shards.photographs_of_shard(photographs, content), shards.group_path(part.path, begin)
        there = shards.is_group_of(path, examples)
        pixels = None if there else reader.submit(_pixels, config, photographs, resolutions[part.resolution])
        return Group(part, begin, path, examples, pixels)

    def begun(group: Group) -> tuple[Group, Callable[[], None] | None]:
        """A group whose work the devices have, and what waits for that and writes it; None where it is there."""
        if group.pixels is None:
            return group, None
        readable, images, losers = group.pixels.result()
        resolution, before = resolutions[group.part.resolution], records[group.part.role]
        made = begin_records(
            config, sampler, scorer, readable, images, resolution, pipeline.tokenize, before, concepts, losers
        )

        def write() -> None:
            ids = {photograph.id for photograph in readable}
            examples = [e._replace(readable=e.id in ids) for e in group.examples]
            shards.write_shard(group.path, schema, made(), examples)

        return group, write

    silent = not processes.is_first()
    with ThreadPoolExecutor(1) as reader:
        bar = tqdm(groups, desc=f"{config.stage} pairs", unit="group", disable=silent)
        for (part, begin, *_), write in one_ahead(begun, one_ahead(lambda group: read(*group), bar)):
            if write:
                write()
            if begin + size >= len(part.photographs):
                shards.join(part.path, [shards.group_path(part.path, b) for b in range(0, len(part.photographs), size)])
                index.save()
    processes.barrier()
    if processes.is_first():
        splits: dict[str, list[Path]] = {}
        for part in plan:
            splits.setdefault(f"{part.role}_{part.resolution}", []).append(part.path)
        shards.finish(plan[0].path.parent, schema, splits, latents)


def _pixels(config: ConfigDict, photographs: Sequence[Photograph], resolution: tuple[int, int]) -> Pixels:
    """The photographs that can be read, their pixels, and those of the losers that are given; None where not used."""
    if not uses_pixels(config):
        return photographs, None, None
    if config.pairs.loser == "given":
        return load_losers(*load_images(photographs, resolution))
    return *load_images(photographs, resolution), None


def _group_size(settings: ConfigDict) -> int:
    """How many prompts are drawn, scored and kept at a time: as few as fill whole batches."""
    pooled = "pool" in (settings.winner, settings.loser)
    return settings.batch // math.gcd(settings.batch, settings.pool_size) if pooled else settings.batch


def _warn_of_long(pipeline: pipelines.Pipeline, photographs: Sequence[Photograph]) -> None:
    """Says how many captions have more tokens than CLIP reads, of which the first are used. Of many captions it counts
    the tokens of some: those of 300,000 would take a core 20 s and gigabytes at every start."""
    some = photographs[:: max(1, len(photographs) // _COUNTED)]
    counts = pipeline.count_tokens([photograph.caption for photograph in some])
    longest, over = int(np.argmax(counts)), sum(count > pipelines.POSITIONS for count in counts)
    if over:
        logging.warning("%d of %d captions (%d in all) have more than %d tokens, the first of which are used; that of "
                        "%s has %d", over, len(counts), len(photographs), pipelines.POSITIONS, some[longest].id,
                        counts[longest])  # fmt: skip
