"""Builds the pair shards of a stage: candidates from ε_base, their scores, winners and losers."""

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from hgdpo_jax import config as configuration
from hgdpo_jax.curriculum.forwards import saving
from hgdpo_jax.curriculum.missing import why_no_pair
from hgdpo_jax.curriculum.plan import ShardPlan, group_size, shards_to_make
from hgdpo_jax.curriculum.prepared import Prepared, prepare
from hgdpo_jax.curriculum.rated import keep_rated
from hgdpo_jax.curriculum.store import Store, open_store
from hgdpo_jax.curriculum.summary import summarise
from hgdpo_jax.curriculum.winners import Finish, Group, Images, uses_pixels, winners_of
from hgdpo_jax.data import shards
from hgdpo_jax.data.pairs import RecordsById, open_stage
from hgdpo_jax.data.photographs import Photograph
from hgdpo_jax.data.pixels import load_images, load_losers
from hgdpo_jax.data.record import Record, features
from hgdpo_jax.devices.mesh import describe_mesh, local_mesh
from hgdpo_jax.devices.sharding import parameter_placer
from hgdpo_jax.devices.transfer import one_ahead
from hgdpo_jax.diffusion import pipeline as pipelines
from hgdpo_jax.diffusion.sampler import Sampler
from hgdpo_jax.faces.concepts import encoder_of
from hgdpo_jax.run import processes
from hgdpo_jax.run.files import write_json
from hgdpo_jax.run.folder import BASE_STAGE, require_plain
from hgdpo_jax.run.index import Index, index_of_run
from hgdpo_jax.run.locks import lock_for_all
from hgdpo_jax.run.progress import Progress
from hgdpo_jax.run.settings import named
from hgdpo_jax.scoring.scorers import open_scorers
from hgdpo_jax.training.finished import load_policy


def build(config: ConfigDict, workdir: Path, more: Callable[[], None] | None = None) -> None:
    """Builds all shards of `config.stage` that are not there yet.

    Args:
        config: of the stage.
        workdir: of the run.
        more: is called by process 0 whenever some more pairs are there.

    Raises:
        UserError: an input is missing or broken, the folder holds shards of other settings or inputs, or another
            command is building them.
    """
    require_plain(workdir)
    folder, index = workdir / config.stage / "pairs", index_of_run(workdir)
    prepared = prepare(config, workdir, index)
    config, photographs, plan = prepared.config, prepared.photographs, prepared.plan
    with lock_for_all(folder):
        content = index if uses_pixels(config) else None
        finished = processes.broadcast(lambda: shards.is_finished(folder, prepared.inputs))
        todo = processes.broadcast(lambda: shards_to_make(plan, finished, content))
        if finished and not todo:
            print(f"{folder}: already built")
            _keep(config, folder)
        else:
            store = open_store(config, workdir, prepared.inputs)
            builder = Builder(prepared, content, store)
            builder.summarise(index)
            own = todo[jax.process_index() :: jax.process_count()]
            builder.make(own, index, more if processes.is_first() else None)
            if store:
                made, read = store.counts()
                print(f"{folder}: {made:,} candidates were made, {read:,} read from {store.folder}")
        index.save()
        if prepared.rated is not None and processes.is_first():
            keep_rated(config, prepared.rated, folder)
        processes.barrier()
        done = open_stage(workdir, config.stage, index)
        index.save()
        reasons = why_no_pair(config, photographs, plan) | done.ratings.dropped
        if processes.is_first():
            write_json(folder / "without_pair.json", reasons)
    for role, sources in done.sources.items():
        found = sum(map(len, sources))
        print(f"{folder}: {found} of {len(photographs[role])} {role} examples have a pair")
    if reasons:
        counted = ", ".join(f"{reason} ({n})" for reason, n in Counter(reasons.values()).most_common())
        print(f"{folder}: {len(reasons)} have none: {counted}; without_pair.json names them")
    if done.ratings.better:
        print(f"{folder}: {len(done.ratings.better)} pairs were rated by hand: {done.ratings}")


def _keep(config: ConfigDict, folder: Path) -> None:
    """Notes with which settings pairs are built: what they are made from names no folders."""
    if processes.is_first():
        write_json(folder / "config.json", configuration.to_json(config))


class Pixels(NamedTuple):
    """The photographs of a group that can be read, their pixels, and those of given losers; None where not used."""

    photographs: Sequence[Photograph]
    images: Images | None = None
    losers: Images | None = None


class _Part(NamedTuple):
    """Some prompts of a shard, which are made and kept at once.

    Attributes:
        shard: theirs.
        path: where they are kept until the shard is whole.
        made_of: their photographs, with the content of the files.
        pixels: which are being read; None where the part is there.
        last: whether the shard is whole with it.
    """

    shard: ShardPlan
    path: Path
    made_of: list[shards.ShardPhotograph]
    pixels: Future[Pixels] | None
    last: bool


class Builder:
    """Makes shards, part by part: while the devices compute one, the next is read and the one before is written.

    Args:
        prepared: what they are made of.
        content: the index of the photographs' content, where their pixels are used.
        store: keeps candidates for other stages, if any.
    """

    def __init__(self, prepared: Prepared, content: Index | None, store: Store | None = None) -> None:
        config, plan, earlier = prepared.config, prepared.plan, prepared.earlier
        settings, model, mesh = config.pairs, config.model, local_mesh()
        print(f"{config.stage} pairs: {describe_mesh(mesh)}, {settings.batch} images at a time")
        self.config, self.plan, self.content, self.inputs = config, plan, content, prepared.inputs
        self.folder, self.claimed = plan[0].path.parent, False
        if settings.policy == BASE_STAGE:
            self.pipeline = pipelines.load_pipeline(
                model.base,
                model.dtype,
                vae=model.vae,
                lora=model.lora,
                param_dtype=model.dtype,
                place=parameter_placer(mesh),
            )
        else:
            self.pipeline = load_policy(config, prepared.workdir, settings.policy, mesh)
        self.sampler = Sampler.from_config(self.pipeline, mesh, settings, config.seed)
        with named("pairs.scorer", settings.scorer):
            scorers = open_scorers(settings.scorer, mesh) if settings.loser not in ("none", "given") else []
        concepts = encoder_of(config) if config.train.params == "adapter" else None
        self.winners = winners_of(config, self.sampler, scorers, concepts, store)
        self.resolutions = configuration.resolutions(config)
        self.latents = {name: self.pipeline.latent_shape(size) for name, size in self.resolutions.items()}
        if earlier:
            earlier.require(self.latents)
        channels, tokens = next(iter(self.latents.values()))[2], self.pipeline.tokenize([""]).shape[1]
        concept = concepts.nothing.shape[1:] if concepts else None
        self.schema = features(channels, tokens, settings.loser != "none", concept)
        self.earlier: dict[str, RecordsById] = {}
        if earlier:
            self.earlier = {role: earlier.by_id(role) for role in {shard.role for shard in plan}}
        self.size = group_size(config)

    def summarise(self, index: Index) -> None:
        """Says what was read, and what of the drawing is saved."""
        if processes.is_first():
            read = summarise(self.config, self.plan, self.pipeline, index)
            for line in read + saving(self.config, self.pipeline.schedule):
                print(f"{self.config.stage} pairs: {line}")

    def draw(self, shard: ShardPlan, photographs: Sequence[Photograph]) -> list[Record]:
        """The records of some photographs of a shard, which are kept nowhere."""
        pixels = self._pixels(photographs, self.resolutions[shard.resolution])
        return self._records(pixels, shard)() if pixels.photographs else []

    def make(self, numbers: Sequence[int], index: Index, more: Callable[[], None] | None) -> None:
        """Makes these shards of the plan, calling `more` after each part, and, once all of the plan are there, the
        manifest."""
        todo = [self.plan[number] for number in numbers]
        begins = [(shard, begin) for shard in todo for begin in range(0, len(shard.photographs), self.size)]
        with ThreadPoolExecutor(1) as reader:
            bar = Progress(begins, desc=f"{self.config.stage} pairs", unit="group")
            parts = one_ahead(lambda at: self._read(at[0], at[1], reader), bar)
            for part, finish in one_ahead(self._begin, parts):
                if finish:
                    finish()
                    if more:
                        more()
                if part.last:
                    shards.join(part.shard.path, self._paths(part.shard))
                    index.save()
        processes.barrier()
        if processes.is_first():
            splits: dict[str, list[Path]] = {}
            for shard in self.plan:
                splits.setdefault(f"{shard.role}_{shard.resolution}", []).append(shard.path)
            self._claim()
            shards.finish(self.folder, self.schema, splits, self.latents)

    def _claim(self) -> None:
        """Says whose the folder is, with the first that this process keeps there."""
        shards.begin(self.folder, self.inputs)
        if not self.claimed:
            _keep(self.config, self.folder)
        self.claimed = True

    def _paths(self, shard: ShardPlan) -> list[Path]:
        return [shards.group_path(shard.path, begin) for begin in range(0, len(shard.photographs), self.size)]

    def _read(self, shard: ShardPlan, begin: int, reader: ThreadPoolExecutor) -> _Part:
        photographs = shard.photographs[begin : begin + self.size]
        made_of, path = shards.photographs_of_shard(photographs, self.content), shards.group_path(shard.path, begin)
        there = shards.is_group_of(path, made_of)
        pixels = None if there else reader.submit(self._pixels, photographs, self.resolutions[shard.resolution])
        return _Part(shard, path, made_of, pixels, begin + self.size >= len(shard.photographs))

    def _pixels(self, photographs: Sequence[Photograph], resolution: tuple[int, int]) -> Pixels:
        if not uses_pixels(self.config):
            return Pixels(photographs)
        readable = load_images(photographs, resolution)
        return Pixels(*load_losers(*readable)) if self.config.pairs.loser == "given" else Pixels(*readable)

    def _begin(self, part: _Part) -> tuple[_Part, Callable[[], None] | None]:
        """A part whose work the devices have, and what waits for that and writes it; None where it is there."""
        if part.pixels is None:
            return part, None
        pixels = part.pixels.result()
        records = self._records(pixels, part.shard) if pixels.photographs else list

        def finish() -> None:
            readable = {photograph.id for photograph in pixels.photographs}
            made_of = [entry._replace(readable=entry.id in readable) for entry in part.made_of]
            encoded = shards.encode(self.schema, records())
            self._claim()
            shards.write_encoded(part.path, encoded, made_of)

        return part, finish

    def _records(self, pixels: Pixels, shard: ShardPlan) -> Finish:
        ids = self.pipeline.tokenize([photograph.caption for photograph in pixels.photographs])
        earlier = self.earlier.get(shard.role)
        losers = [] if earlier is None else [earlier[photograph.id] for photograph in pixels.photographs]
        resolution = self.resolutions[shard.resolution]
        return self.winners.begin(Group(pixels.photographs, ids, resolution, pixels.images, pixels.losers, losers))
