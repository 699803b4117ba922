"""What a stage is trained with: devices, ε_base, pairs, loss and optimizer; and what its checkpoints depend on."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from hgdpo_jax import config as configuration
from hgdpo_jax.data.pairs import Pairs, open_stage, open_stages
from hgdpo_jax.data.record import WithScores
from hgdpo_jax.devices.mesh import make_mesh, require_divisible
from hgdpo_jax.diffusion import pipeline as pipelines
from hgdpo_jax.diffusion.pipeline import Pipeline
from hgdpo_jax.diffusion.process import Process
from hgdpo_jax.faces.concepts import encoder_hash
from hgdpo_jax.models.int8 import quantise
from hgdpo_jax.run import provenance
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.folder import pair_stages
from hgdpo_jax.run.index import Index
from hgdpo_jax.run.prompts import read_prompts
from hgdpo_jax.training import step as steps
from hgdpo_jax.training import text_cache
from hgdpo_jax.training.board import require_package
from hgdpo_jax.training.optimizer import ADDED, make_optimizer
from hgdpo_jax.training.policy import draws_otherwise, load_trainable


class Inputs(NamedTuple):
    """All that a config names, read and checked.

    Attributes:
        pipeline: ε_base with the fresh parameters that the stage trains.
        policy, frozen: its parameters in two parts, see :func:`hgdpo_jax.training.step.split_params`.
        made_from: what a checkpoint depends on, see :mod:`hgdpo_jax.run.provenance`.
        prompts: of `train.prompts`, if any.
    """

    mesh: Mesh
    pipeline: Pipeline
    policy: steps.Params
    frozen: steps.Params
    pairs: Pairs
    loss: steps.Loss
    optimizer: optax.GradientTransformationExtraArgs
    made_from: dict[str, Any]
    prompts: Sequence[str] = ()


def read(config: ConfigDict, workdir: Path, index: Index) -> Inputs:
    """The inputs of a stage.

    Raises:
        UserError: an input is missing or is not what it claims to be, or does not fit the others.
    """
    settings = config.train
    prompts = read_prompts(Path(settings.prompts), "config key train.prompts=") if settings.prompts else ()
    if settings.wandb:
        require_package(settings.wandb)
    mesh = make_mesh(config.mesh)
    require_divisible(settings.batch // settings.accumulate, mesh, "train.batch / train.accumulate")
    pairs = open_stages(workdir, pair_stages(config), index)
    base = pipelines.base_hash(config.model.base, config.model.vae, config.model.lora, index)
    pairs.require_from({"model.base": base})
    text = None
    if settings.text_cache:
        _require_fit(config, load_trainable(config, mesh, weights=False), pairs)  # before captions are encoded
        pairs, text = text_cache.attach(config, workdir / config.stage, pairs, prompts, base, mesh, index)
    pipeline = load_trainable(config, mesh, text=text)
    _require_fit(config, pipeline, pairs)
    if settings.quantize == "int8":
        quantise(pipeline.networks.values())
    denoiser, policy, frozen = steps.split_params(pipeline, settings.params)
    loss = loss_of(config, denoiser, pipeline.schedule, mesh)
    inputs = {"model.base": base, "the pairs": pairs.hash}
    if settings.objective == "smpo":
        _require_scores(config, workdir, index)
        pairs = replace(pairs, sources={role: [*map(WithScores, found)] for role, found in pairs.sources.items()})
    if settings.params == "adapter":
        inputs["the concept encoder"] = encoder_hash(config, index)
    made_from = provenance.settings(config, depends_on(config))
    made_from |= {provenance.content_key(name): value for name, value in inputs.items()}
    return Inputs(mesh, pipeline, policy, frozen, pairs, loss, make_optimizer(settings), made_from, prompts)


def _require_fit(config: ConfigDict, pipeline: Pipeline, pairs: Pairs) -> None:
    """Raises UserError where the pairs are not of the resolutions, or the base draws no looks as the config says."""
    pairs.require({name: pipeline.latent_shape(size) for name, size in configuration.resolutions(config).items()})
    pipeline.require_guidance(config.evaluate.guidance)


def _require_scores(config: ConfigDict, workdir: Path, index: Index) -> None:
    """Raises UserError where pairs that a stage learns from have no scores, or people chose among them."""
    for stage in pair_stages(config):
        pairs = open_stage(workdir, stage, index)
        if pairs.manifest["made_from"].get("pairs.loser") == "given":
            raise UserError(f"config key train.objective=smpo: needs scores, and the pairs of {stage} are given")
        if pairs.ratings.better:
            raise UserError("config key train.objective=smpo: learns from scores alone, and people have rated the "
                            f"pairs of {stage}; take another objective")  # fmt: skip


def loss_of(config: ConfigDict, denoiser: steps.Denoiser, schedule: Process, mesh: Mesh) -> steps.Loss:
    """The loss that a stage minimises on a mesh."""
    if config.train.objective == "sft":
        return steps.sft_loss(denoiser, schedule)
    train, sharded = config.train, mesh.shape["fsdp"] > 1
    return steps.preference_loss(denoiser, schedule, train.blocks, train.objective, sharded)


def depends_on(config: ConfigDict) -> list[str]:
    """The settings that decide what a stage learns. Only rounding depends on the mesh, on `train.accumulate` and on
    `train.checkpointing`."""
    train = config.train
    keys = ["stage", "seed", "model.dtype", "train.objective", "train.start", "train.reference", "train.params"]
    keys += ["train.blocks"] if train.params == "lora" else []
    lora = ["train.lora_rank", "train.lora_alpha", "train.lora_modules", "train.lora_dropout", "train.quantize"]
    keys += lora if train.params in ("lora", "text_lora") else []
    if train.objective != "sft":
        keys += ["train.beta", "train.lambda_stat", "train.objective_weight", *(f"train.{name}" for name in ADDED)]
    of_batch = train.objective in ("kto", "smpo") or train.auto_beta  # they take something of a microbatch's pairs
    keys += ["train.accumulate"] if of_batch else []
    keys += ["train.reference_cache"] if train.reference_cache else []
    keys += ["train.noise_levels", "train.noise_shift"] if draws_otherwise(config) else []
    keys += ["data.caption_dropout", "data.concept_dropout"] if train.objective == "sft" else []
    keys += ["train.batch", "train.lr", "train.optimizer", "train.schedule", "train.warmup", "train.weight_decay"]
    keys += ["train.clip_norm", "train.ema"] + (["train.adam"] if train.optimizer != "adafactor" else [])
    keys += ["train.steps"] if train.schedule == "cosine" else []
    return keys + (["adapter.kind"] if train.params == "adapter" else [])
