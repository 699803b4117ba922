"""`--check`: says what a command has read and what it will need, or what is wrong, without starting it.

Nothing is written. What another command has to make before is said, and is no fault: so the checks of a whole
curriculum can be run before its first command.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TypeVar

from ml_collections import ConfigDict

from hgdpo_jax.checking import cost, disk, models
from hgdpo_jax.config import NO_STAGE
from hgdpo_jax.curriculum.plan import ShardPlan, plan_shards
from hgdpo_jax.curriculum.prepared import earlier_pairs, inputs_of, read_photographs, require_fit, require_own
from hgdpo_jax.curriculum.rated import read_rated
from hgdpo_jax.curriculum.store import FOLDER
from hgdpo_jax.curriculum.summary import summarise
from hgdpo_jax.data import shards
from hgdpo_jax.data.pairs import Pairs, build_command, open_stages
from hgdpo_jax.data.photographs import Photograph
from hgdpo_jax.data.resolutions import settled
from hgdpo_jax.devices.mesh import describe_mesh, local_mesh, make_mesh, require_divisible
from hgdpo_jax.diffusion.pipeline import Pipeline, base_hash
from hgdpo_jax.diffusion.source import Source, open_source
from hgdpo_jax.run import processes, provenance
from hgdpo_jax.run.buckets import bucket
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.folder import pair_stages, require_plain, stage_config, train_command, was_started
from hgdpo_jax.run.index import Index, index_of_run
from hgdpo_jax.run.locks import lock_owner
from hgdpo_jax.run.prompts import read_prompts
from hgdpo_jax.run.provenance import MadeFrom
from hgdpo_jax.scoring import sets
from hgdpo_jax.training import reference_cache, text_cache
from hgdpo_jax.training.board import require_package
from hgdpo_jax.training.changes import changes
from hgdpo_jax.training.checkpoints import Checkpoints
from hgdpo_jax.training.finished import require_base
from hgdpo_jax.training.inputs import depends_on

Found = TypeVar("Found")


class _Check:
    """One check: each of its parts is made, whatever became of the others.

    Args:
        config: of the stage.
        workdir: of the run.
        command: that is checked, in words.
    """

    def __init__(self, config: ConfigDict, workdir: Path, command: str) -> None:
        require_plain(workdir)
        self.config, self.workdir, self.index = config, workdir, index_of_run(workdir, writes=False)
        self._command, self._faults = command, dict[str, None]()

    def found(self, make: Callable[[], Found]) -> Found | None:
        """What is made; None where it is at fault, which is kept for the end. Of several processes the first fault
        ends all: they cannot go on without what one of them has not made."""
        try:
            return make()
        except UserError as error:
            if not processes.is_alone():
                raise
            self._faults[str(error)] = None
            return None

    def say(self, topic: str, make: Callable[[], Sequence[str]]) -> None:
        """Prints the lines of a topic."""
        for line in self.found(make) or ():
            print(f"{self.config.stage} {self._command}: {topic}: {line}")

    def end(self) -> None:
        """Raises UserError that names all faults."""
        if self._faults:
            raise UserError("; also: ".join(self._faults))


def check_pairs(config: ConfigDict, workdir: Path) -> None:
    """Checks building the pairs of `config.stage`, and prints what it needs.

    Raises:
        UserError: names what is wrong, once all of the rest is said.
    """
    require_own(config)
    check = _Check(config, workdir, "pairs")
    folder, index, asked, earlier = workdir / config.stage / "pairs", check.index, config, None
    if config.pairs.loser not in NO_STAGE:
        earlier = _pairs_before(check, [config.pairs.loser], lambda: earlier_pairs(config, workdir, index))
    source, pipeline = _base(check)
    read = check.found(lambda: read_photographs(config, workdir, index))
    config, photographs = read or (config, dict[str, list[Photograph]]())
    check.config = config
    planned = check.found(lambda: plan_shards(config, folder, photographs, earlier, index)) if read else None
    plan = planned or []

    def inputs() -> MadeFrom:
        return inputs_of(asked, config, workdir, photographs, earlier, index)

    if earlier and planned is not None:
        check.found(lambda: require_fit(config, plan, earlier, inputs()))
    if pipeline and plan:
        check.say("data", lambda: summarise(config, plan, pipeline, index))
        check.found(lambda: read_rated(config, {p.id for found in photographs.values() for p in found}))
    _networks(check, source, pipeline, plan)
    check.say("folder", lambda: _built(folder, plan, inputs))
    computed, finished = pipeline and check.found(lambda: models.latents(config, pipeline)), _is_finished(folder)
    if earlier and computed:
        check.found(lambda: earlier.require(computed))
    if pipeline and computed and plan and not finished:
        if source and {config.pairs.winner, config.pairs.loser} & {"pool", "sdrecon"}:
            _say_drawing(check, source, plan)
        needed = disk.bytes_of_pairs(config, plan, pipeline)
        check.say("disk", lambda: [disk.require_room(workdir, [folder], needed, "the pairs")])
        if config.pairs.keep_candidates:
            kept, whole = [workdir / FOLDER], disk.bytes_of_candidates(config, plan, pipeline)
            check.say("disk", lambda: [disk.require_room(workdir, kept, whole, "candidates that are not kept yet")])
    check.end()


def check_training(config: ConfigDict, workdir: Path, may_change: Sequence[str] = ()) -> None:
    """Checks the training of `config.stage`, and prints what it needs.

    Args:
        config: of the stage.
        workdir: of the run.
        may_change: see :func:`hgdpo_jax.training.loop.train`.

    Raises:
        UserError: names what is wrong, once all of the rest is said.
    """
    check = _Check(config, workdir, "main")
    folder, index, stages = workdir / config.stage, check.index, pair_stages(config)
    pairs = _pairs_before(check, stages, lambda: open_stages(workdir, stages, index))
    if pairs:
        check.config = config = check.found(lambda: settled(config, workdir)) or config
        check.say("data", lambda: [_records(pairs)])
    _stage_before(check)
    source, pipeline = _base(check)
    _networks(check, source, pipeline, [])
    latents = check.found(lambda: models.latents(config, pipeline)) if pipeline else None
    if pairs and latents:
        check.found(lambda: pairs.require(latents))
    if pairs and source:
        check.found(lambda: pairs.require_from({"model.base": _base_hash(config, index)}))
    check.say("folder", lambda: _trained(config, folder, may_change))
    if source and pipeline and latents:
        _say_step(check, source, pipeline, pairs)
    check.end()


def _say_drawing(check: _Check, source: Source, plan: Sequence[ShardPlan]) -> None:
    """Memory and hours of drawing."""
    config, mesh = check.config, local_mesh()
    drawing = check.found(lambda: cost.plan_drawing(config, source, mesh))
    if drawing:
        what = f"drawing {drawing[0].examples} images at a time"
        check.say("memory", lambda: [f"{cost.memory(what, drawing, mesh)}; the scorer comes on top"])
        hours = cost.hours_of_pairs(config, plan, drawing, cost.share_of(mesh))
        check.say("hours", lambda: [cost.in_words(hours, "drawing them, without scoring", mesh)])


def _say_step(check: _Check, source: Source, pipeline: Pipeline, pairs: Pairs | None) -> None:
    """Memory and hours of steps; the disk that checkpoints take, and what is computed once of pairs that are there."""
    config = check.config
    mesh = check.found(lambda: make_mesh(config.mesh))
    planned = check.found(lambda: cost.plan_step(config, source, mesh)) if mesh else None
    if mesh and planned:
        plan, held = planned
        check.say("memory", lambda: [cost.memory(f"a step of {config.train.batch}", [plan], mesh)])
        hours = cost.hours_of_steps(config, plan, cost.share_of(mesh))
        check.say("hours", lambda: [cost.in_words(hours, f"{config.train.steps:,} steps", mesh)])
        check.say("disk", lambda: [_room(check, pairs, pipeline, held)])


def _room(check: _Check, pairs: Pairs | None, pipeline: Pipeline, held: dict[str, int]) -> str:
    """What a training writes, and what is free. Raises UserError where that is too little."""
    config, workdir = check.config, check.workdir
    needed = {"checkpoints": disk.bytes_of_checkpoints(config, held)}
    if pairs and config.train.reference_cache:
        needed["the reference's predictions"] = reference_cache.bytes_of_predictions(config, pairs)
    if pairs and config.train.text_cache:
        needed["captions' embeddings"] = text_cache.bytes_of_captions(pairs, pipeline.text)
    folders = [workdir / config.stage / name for name in ("policy", "reference", "reference_cache", "text_cache")]
    return disk.require_room(workdir, folders, sum(needed.values()), ", ".join(needed))


def _is_finished(pairs: Path) -> bool:
    """Whether a folder of pairs was made to its end, from whatever it was."""
    return (pairs / "manifest.json").is_file()


def _pairs_before(check: _Check, stages: Sequence[str], open_them: Callable[[], Pairs | None]) -> Pairs | None:
    """The pairs of stages; where they are not finished, says so."""
    missing = [stage for stage in stages if not _is_finished(check.workdir / stage / "pairs")]
    lines = [f"the pairs of {stage} come first: {build_command(stage, check.workdir)}" for stage in missing]
    check.say("before", lambda: lines)
    return None if missing else check.found(open_them)


def _stage_before(check: _Check) -> None:
    """Says where the stage that this one starts from is not trained to its end; its base has to be this one."""
    start, workdir = check.config.train.start, check.workdir

    def is_trained() -> bool:
        if not was_started(workdir, start):
            return False
        train = stage_config(workdir, start).train
        with Checkpoints(workdir / start, train.checkpoints) as checkpoints:
            return (checkpoints.latest() or 0) >= train.steps

    if start == "base":
        return
    trained = check.found(is_trained)
    if trained:
        check.found(lambda: require_base(workdir, start, _base_hash(check.config, check.index)))
    elif trained is False:
        check.say("before", lambda: [f"the training of {start} comes first: {train_command(start, workdir)}"])


def _base(check: _Check) -> tuple[Source | None, Pipeline | None]:
    """ε_base, opened, and without weights."""
    config, model = check.config, check.config.model
    source = check.found(lambda: open_source(model.base, model.vae, model.lora))
    pipeline = check.found(lambda: models.require_base(config, source)) if source else None
    return source, pipeline


def _networks(check: _Check, source: Source | None, pipeline: Pipeline | None, plan: Sequence[ShardPlan]) -> None:
    """Base, scorers, adapter, devices, prompts and bucket: also what only later commands will use."""
    config, index = check.config, check.index
    train = config.train
    listed = [photograph for part in plan for photograph in part.photographs]
    if source and pipeline:
        check.say("models", lambda: [models.describe_base(source, pipeline)])
        check.found(lambda: models.require_samplers(config, pipeline))
        check.say("models", lambda: models.require_scorers(config, pipeline, listed))
        check.say("models", lambda: sets.require_networks(config))
    check.say("models", lambda: models.require_adapter(config, index))
    check.say("devices", lambda: [_devices(config)])
    if train.wandb:
        check.found(lambda: require_package(train.wandb))
    if train.prompts:
        check.found(lambda: read_prompts(Path(train.prompts), "config key train.prompts="))
    if train.checkpoints:
        check.found(lambda: bucket(train.checkpoints, "train.checkpoints"))


def _base_hash(config: ConfigDict, index: Index) -> str:
    return base_hash(config.model.base, config.model.vae, config.model.lora, index)


def _devices(config: ConfigDict) -> str:
    mesh, train = make_mesh(config.mesh), config.train
    require_divisible(train.batch // train.accumulate, mesh, "train.batch / train.accumulate")
    return describe_mesh(mesh)


def _records(pairs: Pairs) -> str:
    splits = pairs.manifest["splits"].items()
    return "pairs of " + ", ".join(f"{name.replace('_', ', ')}: {split['records']:,}" for name, split in splits)


def _require_free(folder: Path) -> None:
    if owner := lock_owner(folder):
        raise UserError(f"{folder}: is being written by {owner}; wait until that has ended")


def _built(folder: Path, plan: Sequence[ShardPlan], made_from: Callable[[], MadeFrom]) -> list[str]:
    """How far the pairs are. Raises UserError where they were begun from something else."""
    _require_free(folder)
    if not (folder / "building.json").is_file() or not plan:
        return []
    shards.is_finished(folder, made_from())  # which hashes all inputs
    whole = sum(shards.is_whole(part.path) for part in plan)
    return [f"{folder} holds {whole} of {len(plan)} shards already"]


def _trained(config: ConfigDict, folder: Path, may_change: Sequence[str]) -> list[str]:
    """How far the training is. Raises UserError where it was begun with other settings."""
    _require_free(folder)
    if not was_started(folder.parent, config.stage):
        return []
    with closing(Checkpoints(folder, config.train.checkpoints)) as checkpoints:
        newest = checkpoints.latest()
        if newest is None:
            return []
        found = checkpoints.meta(newest)["made_from"]
    content = {key: value for key, value in found.items() if key.startswith(provenance.content_key(""))}
    changes(found, provenance.settings(config, depends_on(config)) | content, may_change, f"the checkpoint in {folder}")
    return [f"{folder} stands at step {newest} of {config.train.steps} already"]
