"""Builds the pair shards of a stage: candidates from ε_base, their scores, winners and losers."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from hgdpo_jax import config as configuration
from hgdpo_jax.curriculum.missing import require_photographs, why_no_pair
from hgdpo_jax.curriculum.plan import Photographs, ShardPlan, made_from, plan_shards, require_captions, shards_to_make
from hgdpo_jax.curriculum.winners import Finish, Group, Images, uses_pixels, winners_of
from hgdpo_jax.data import shards
from hgdpo_jax.data.pairs import Pairs, RecordsById, open_stage
from hgdpo_jax.data.photographs import Photograph, list_examples
from hgdpo_jax.data.pixels import load_images, load_losers
from hgdpo_jax.data.record import features
from hgdpo_jax.devices.mesh import describe_mesh, local_mesh
from hgdpo_jax.devices.sharding import parameter_placer
from hgdpo_jax.devices.transfer import one_ahead
from hgdpo_jax.diffusion import pipeline as pipelines
from hgdpo_jax.diffusion.sampler import Sampler
from hgdpo_jax.faces.concepts import encoder_of
from hgdpo_jax.run import processes, provenance
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import write_json
from hgdpo_jax.run.folder import require_plain
from hgdpo_jax.run.index import Index, first_process_first, index_of_run
from hgdpo_jax.run.locks import lock_for_all
from hgdpo_jax.run.provenance import MadeFrom
from hgdpo_jax.run.settings import named
from hgdpo_jax.scoring.preference import Scorer

_COUNTED = 5000  # captions, at least, whose tokens are counted at the start


def build(config: ConfigDict, workdir: Path) -> None:
    """Builds all shards of `config.stage` that are not there yet.

    Raises:
        UserError: an input is missing or broken, the folder holds shards of other settings or inputs, or another
            command is building them.
    """
    if config.train.pairs:
        raise UserError(f"{config.stage} learns from the pairs of {config.train.pairs}: build those")
    if config.pairs.loser not in ("none", "given") and not config.pairs.scorer:
        raise UserError("config key pairs.scorer: is empty; set it to the folder of a CLIPModel such as PickScore v1")
    require_plain(workdir)
    folder, index, loser = workdir / config.stage / "pairs", index_of_run(workdir), config.pairs.loser
    earlier = open_stage(workdir, loser, index) if loser.startswith("stage") else None
    listed = first_process_first(index, lambda: list_examples(config, config.data.split, "heldout", index=index))
    photographs: Photographs = dict(zip(("train", "heldout"), listed, strict=True))
    processes.broadcast(lambda: require_photographs(photographs, index))
    inputs = made_from(config, photographs, earlier, index)
    if earlier:
        earlier.require_from({name: inputs[provenance.content_key(name)] for name in ("model.base", "pairs.scorer")})
    with lock_for_all(folder):
        plan = first_process_first(index, lambda: plan_shards(config, folder, photographs, earlier, index))
        if earlier and not earlier.is_from({"captions.jsonl": inputs[provenance.content_key("captions.jsonl")]}):
            processes.broadcast(lambda: require_captions(plan, earlier))
        if earlier and not plan:
            raise UserError(f"photographs {config.data.photographs}: none has a pair in {earlier.folder}, from where "
                            f"{loser} takes the losers; give those that it was built from")  # fmt: skip
        content = index if uses_pixels(config) else None
        finished = processes.broadcast(lambda: shards.is_finished(folder, inputs))
        todo = processes.broadcast(lambda: shards_to_make(plan, finished, content))
        if finished and not todo:
            print(f"{folder}: already built")
        else:
            _Builder(config, plan, earlier, content, inputs).make(
                todo[jax.process_index() :: jax.process_count()], index
            )
        index.save()
        done = open_stage(workdir, config.stage, index)
        index.save()
        reasons = why_no_pair(config, photographs, plan)
        if processes.is_first():
            write_json(folder / "without_pair.json", reasons)
    for role, sources in done.sources.items():
        found = sum(map(len, sources))
        print(f"{folder}: {found} of {len(photographs[role])} {role} photographs have a pair")
    if reasons:
        counted = ", ".join(f"{reason} ({n})" for reason, n in Counter(reasons.values()).most_common())
        print(f"{folder}: {len(reasons)} have none: {counted}; without_pair.json names them")


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


class _Builder:
    """Makes shards, part by part: while the devices compute one, the next is read and the one before is written.

    Args:
        config: of the stage.
        plan: all its shards.
        earlier: the pairs whose winners lose here.
        content: the index of the photographs' content, where their pixels are used.
        inputs: what the pairs are made from.
    """

    def __init__(
        self,
        config: ConfigDict,
        plan: Sequence[ShardPlan],
        earlier: Pairs | None,
        content: Index | None,
        inputs: MadeFrom,
    ) -> None:
        settings, model, mesh = config.pairs, config.model, local_mesh()
        print(f"{config.stage} pairs: {describe_mesh(mesh)}, {settings.batch} images at a time")
        self.config, self.plan, self.content, self.inputs = config, plan, content, inputs
        self.folder = plan[0].path.parent
        self.pipeline = pipelines.load_pipeline(
            model.base,
            model.dtype,
            vae=model.vae,
            lora=model.lora,
            param_dtype=model.dtype,
            place=parameter_placer(mesh),
        )
        sampler = Sampler.from_config(self.pipeline, mesh, settings, config.seed)
        _warn_of_long(self.pipeline, [photograph for shard in plan for photograph in shard.photographs])
        with named("pairs.scorer", settings.scorer):
            scorer = Scorer(settings.scorer, mesh) if settings.loser not in ("none", "given") else None
        concepts = encoder_of(config) if config.train.params == "adapter" else None
        self.winners = winners_of(config, sampler, scorer, concepts)
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
        # As few prompts at a time as fill whole batches.
        pooled = "pool" in (settings.winner, settings.loser)
        self.size = settings.batch // math.gcd(settings.batch, settings.pool_size) if pooled else settings.batch

    def make(self, numbers: Sequence[int], index: Index) -> None:
        """Makes these shards of the plan and, once all of the plan are there, the manifest."""
        todo = [self.plan[number] for number in numbers]
        begins = [(shard, begin) for shard in todo for begin in range(0, len(shard.photographs), self.size)]
        silent = not processes.is_first()
        with ThreadPoolExecutor(1) as reader:
            bar = tqdm(begins, desc=f"{self.config.stage} pairs", unit="group", disable=silent)
            parts = one_ahead(lambda at: self._read(at[0], at[1], reader), bar)
            for part, finish in one_ahead(self._begin, parts):
                if finish:
                    finish()
                if part.last:
                    shards.join(part.shard.path, self._paths(part.shard))
                    index.save()
        processes.barrier()
        if processes.is_first():
            splits: dict[str, list[Path]] = {}
            for shard in self.plan:
                splits.setdefault(f"{shard.role}_{shard.resolution}", []).append(shard.path)
            shards.begin(self.folder, self.inputs)
            shards.finish(self.folder, self.schema, splits, self.latents)

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
            shards.begin(self.folder, self.inputs)
            shards.write_encoded(part.path, encoded, made_of)

        return part, finish

    def _records(self, pixels: Pixels, shard: ShardPlan) -> Finish:
        ids = self.pipeline.tokenize([photograph.caption for photograph in pixels.photographs])
        earlier = self.earlier.get(shard.role)
        losers = [] if earlier is None else [earlier[photograph.id] for photograph in pixels.photographs]
        resolution = self.resolutions[shard.resolution]
        return self.winners.begin(Group(pixels.photographs, ids, resolution, pixels.images, pixels.losers, losers))


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
