"""The policy that a finished stage hands on, and what it was made from."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from hgdpo_jax.devices.sharding import parameter_placer
from hgdpo_jax.diffusion import pipeline as pipelines
from hgdpo_jax.diffusion.recipe import weighted
from hgdpo_jax.diffusion.source import open_source
from hgdpo_jax.faces.concepts import ConceptEncoder
from hgdpo_jax.models import ip_adapter
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import json_hash
from hgdpo_jax.run.folder import PERSONALISE, stage_config, train_command
from hgdpo_jax.run.index import index_of_run
from hgdpo_jax.run.provenance import content_key, require_same
from hgdpo_jax.training.checkpoints import LATEST, Checkpoints
from hgdpo_jax.training.policy import load_trainable, policy_of, set_policy, with_fresh_adapter
from hgdpo_jax.training.step import Params

BASE, PAIRS = content_key("model.base"), content_key("the pairs")  # their names in what a checkpoint is made from


def with_trained_adapter(
    pipeline: pipelines.Pipeline, settings: ConfigDict, workdir: Path | None, mesh: Mesh
) -> tuple[pipelines.Pipeline, ConceptEncoder | None]:
    """The pipeline with its adapter, and the encoder of concept images; the pipeline as it is and None without one.

    Args:
        pipeline: without an adapter.
        settings: a config's `adapter` group. `weights` is a file of any kind; without it the adapter is that of the
            run's stage `personalise`, with the settings of that stage.
        workdir: of the run, if there is one.
        mesh: to put the weights on.

    Raises:
        UserError: the file is not an IP-Adapter for this UNet, the stage is not finished, or an encoder is missing or
            makes features of another width.
    """
    if settings.weights:
        adapter = ip_adapter.load(settings.weights, pipeline.denoiser, place=parameter_placer(mesh))
        encoder = ConceptEncoder(adapter.config["kind"], settings.image_encoder, settings.identity)
        width, wanted = encoder.nothing.shape[-1], adapter.config["features"]
        if width != wanted:
            raise UserError(f"adapter {settings.weights}: reads features of width {wanted}, its encoder makes {width}; "
                            "give what it was trained with")  # fmt: skip
        return replace(pipeline, adapter=adapter, no_concept=encoder.nothing), encoder
    if workdir is None or not (workdir / PERSONALISE / "config.json").is_file():
        return pipeline, None
    trained = stage_config(workdir, PERSONALISE)
    encoder = ConceptEncoder(trained.adapter.kind, trained.adapter.image_encoder, trained.adapter.identity)
    pipeline = with_fresh_adapter(pipeline, trained, encoder, mesh)
    set_policy(pipeline, finished_policy(workdir, PERSONALISE, policy_of(pipeline, trained), trained))
    return pipeline, encoder


def made_from(workdir: Path, stage: str) -> dict[str, Any]:
    """What the newest checkpoint of a stage was made from, see :mod:`hgdpo_jax.run.provenance`; empty without one."""
    with Checkpoints(workdir / stage, stage_config(workdir, stage).train.checkpoints) as checkpoints:
        step = checkpoints.latest()
        return {} if step is None else checkpoints.meta(step)["made_from"]


def require_base(workdir: Path, stage: str, base: str) -> None:
    """Raises UserError where a stage was trained on another ε_base.

    Args:
        workdir, stage: of the run.
        base: content hash of ε_base.
    """
    found = made_from(workdir, stage).get(BASE, base)
    require_same({BASE: found}, {BASE: base}, f"{stage} in {workdir}", "use that base")


def find_base(workdir: Path, config: ConfigDict, base: str | None, weights: bool = True) -> str:
    """Sets a run's `model.base` to where ε_base is now; returns its content hash.

    Args:
        workdir: of the run.
        config: of a stage; changed.
        base: where it was moved, if it was.
        weights: whether its weights are needed; otherwise they are not read, and taken for those of the training.

    Raises:
        UserError: it is not there, or is another than the stage was trained on.
    """
    config.model.base = base or config.model.base
    try:
        if not weights:
            open_source(config.model.base, config.model.vae, config.model.lora)
            return made_from(workdir, config.stage).get(BASE, "")  # without a checkpoint: the caller refuses that
        found = pipelines.base_hash(config.model.base, config.model.vae, config.model.lora, index_of_run(workdir))
    except UserError as error:
        raise error if base else UserError(f"{error}; if it was moved, say where it is with --base") from error
    require_base(workdir, config.stage, found)
    return found


def finished_policy(workdir: Path, stage: str, like: Params, config: ConfigDict, step: str | None = None) -> Params:
    """The policy that a stage handed on, or that it had at a step.

    Args:
        workdir, stage: of the run.
        like: a policy of the same shape, with the shardings to restore to.
        config: of the network that takes the policy: B is multiplied where the stage scaled its LoRA otherwise.
        step: a number, `latest` or `best`, of a stage that may be unfinished; as `train.hand_on` says unless given.

    Raises:
        UserError: the stage was not trained, or not to its end, or with another kind of policy; it has no such step.
    """
    wanted = stage_config(workdir, stage).train
    with Checkpoints(workdir / stage, wanted.checkpoints) as checkpoints:
        name = "ema" if wanted.ema else "policy"
        policy: Params = checkpoints.restore(_step(checkpoints, wanted, workdir, stage, step), {name: like})[name]
    if not wanted.params.endswith("lora"):
        return policy
    own, given = (train.lora_alpha / train.lora_rank for train in (wanted, config.train))
    return policy if own == given else weighted(policy, own / given)


def policy_hash(workdir: Path, stage: str) -> str:
    """Tells the policy that a stage handed on: what its checkpoint was made from, and its step. Raises UserError as
    :func:`finished_policy`."""
    wanted = stage_config(workdir, stage).train
    with Checkpoints(workdir / stage, wanted.checkpoints) as checkpoints:
        step = _step(checkpoints, wanted, workdir, stage, None)
        meta = checkpoints.meta(step)
        return json_hash([step, meta["made_from"], *meta.get("changes", [])])


def load_policy(config: ConfigDict, workdir: Path, stage: str, mesh: Mesh) -> pipelines.Pipeline:
    """ε_base with the whole policy that a stage of a run handed on.

    Args:
        config: that names ε_base.
        workdir, stage: of the run.
        mesh: to put the weights on.

    Raises:
        UserError: see :func:`finished_policy`.
    """
    own, trained = config.copy_and_resolve_references(), stage_config(workdir, stage).train
    own.train.update({name: trained[name] for name in ("params", "lora_rank", "lora_alpha", "lora_modules")})
    pipeline = load_trainable(own, mesh)
    set_policy(pipeline, finished_policy(workdir, stage, policy_of(pipeline, own), own))
    return pipeline


def finished_step(workdir: Path, stage: str, step: str | None = None) -> int:
    """The step of the policy that :func:`finished_policy` gives, with its arguments and its errors."""
    wanted = stage_config(workdir, stage).train
    with Checkpoints(workdir / stage, wanted.checkpoints) as checkpoints:
        return _step(checkpoints, wanted, workdir, stage, step)


def _step(checkpoints: Checkpoints, wanted: ConfigDict, workdir: Path, stage: str, step: str | None) -> int:
    found = checkpoints.find(step or wanted.hand_on)
    if step is None:
        newest = (found if wanted.hand_on == LATEST else checkpoints.latest()) or 0
        if newest < wanted.steps:
            raise UserError(f"{stage} stands at step {newest} of {wanted.steps}; run first: "
                            f"{train_command(stage, workdir)}")  # fmt: skip
    if found is None:
        there = ", ".join(map(str, checkpoints.steps())) or "none"
        raise UserError(f"--step {step or wanted.hand_on}: {stage} has no such checkpoint in {workdir}; there are: "
                        f"{there}")  # fmt: skip
    return found
