"""The policy: which part of ε_base is trained, and where a stage's result is found again."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from hgdpo_jax import config as configuration
from hgdpo_jax import runtime
from hgdpo_jax.data.concepts import ConceptEncoder, encoder_of
from hgdpo_jax.diffusion import pipeline as pipelines
from hgdpo_jax.diffusion.recipe import weighted
from hgdpo_jax.errors import UserError
from hgdpo_jax.models import ip_adapter
from hgdpo_jax.models.attention import spread
from hgdpo_jax.models.lora import add_lora
from hgdpo_jax.models.unet import UNet2DConditionModel
from hgdpo_jax.provenance import content, require_same
from hgdpo_jax.training.checkpoints import Checkpoints
from hgdpo_jax.training.step import Params, split

CURRICULUM = {"easy": "stage1", "normal": "stage2", "hard": "stage3"}  # the paper's name → our folder
GIVEN = "given"  # one stage of pairs that exist already
STAGES = ("stage0", GIVEN, *CURRICULUM.values())
BASE, PAIRS = content("model.base"), content("the pairs")  # their names in what a checkpoint is made from
# Stages beside the curriculum; `naive` is what it is compared with.
TEXT_ENCODER, PERSONALISE, NAIVE = "text_encoder", "personalise", "naive"


def load(config: ConfigDict, mesh: Mesh, *others: ConfigDict) -> pipelines.Pipeline:
    """ε_base on the mesh, with a fresh LoRA where `train.params` asks for one, which changes nothing yet.

    What is trained is float32; what is frozen is kept in the dtype it is used in.

    Args:
        config: of a stage.
        mesh: to put the weights on.
        others: configs of further stages, for which fresh LoRA is added too.
    """
    pipeline = pipelines.load(
        config.model.base,
        config.model.dtype,
        vae=config.model.vae,
        lora=config.model.lora,
        param_dtype=stored(config),
        place=runtime.placer(mesh),
    )
    arrange(pipeline.unet, config, mesh)
    for stage in (config, *others):
        add_fresh_lora(pipeline, stage, mesh)
        if stage.train.params == "adapter":
            pipeline = _with_fresh_adapter(pipeline, stage, encoder_of(stage), mesh)
    return pipeline


def arrange(unet: UNet2DConditionModel, config: ConfigDict, mesh: Mesh) -> None:
    """How the UNet is computed on the mesh, and what is kept for its gradient."""
    unet.checkpoint(config.train.checkpointing)
    if config.train.blocks == "up":
        unet.share_skips()
    spread(unet, runtime.heads_sharding(mesh))


def stored(config: ConfigDict) -> dict[str, str]:
    """The dtype of each part's parameters: what is trained whole is float32."""
    frozen = config.model.dtype
    unet = "float32" if config.train.params == "all" else frozen
    return {"unet": unet, "text_encoder": frozen, "text_encoder_2": frozen}


def _with_fresh_adapter(
    pipeline: pipelines.Pipeline, config: ConfigDict, encoder: ConceptEncoder, mesh: Mesh
) -> pipelines.Pipeline:
    """The pipeline with an adapter that has learnt nothing yet, for what `encoder` makes of concept images."""
    key = runtime.stream_key(config.seed, "adapter")
    adapter = ip_adapter.fresh(pipeline.unet, config.adapter.kind, encoder.nothing.shape[-1], nnx.Rngs(key))
    state = nnx.state(adapter)
    nnx.update(adapter, runtime.put(state, runtime.shardings(state, mesh)))
    return replace(pipeline, adapter=adapter, no_concept=encoder.nothing)


def with_trained_adapter(
    pipeline: pipelines.Pipeline, settings: ConfigDict, workdir: Path | None, mesh: Mesh
) -> tuple[pipelines.Pipeline, ConceptEncoder | None]:
    """The pipeline with an adapter, and the encoder of what that reads; as it is, and None, where there is none.

    Args:
        pipeline: without.
        settings: a config's `adapter` group. `weights` is a file of any kind; without, the adapter is the one that the
            run's own stage trained, with the settings of that stage.
        workdir: of the run, if there is one.
        mesh: to put the weights on.

    Raises:
        UserError: the file is not an IP-Adapter for this UNet, the stage is not finished, or an encoder is missing or
            makes features of another width.
    """
    if settings.weights:
        adapter = ip_adapter.load(settings.weights, pipeline.unet, place=runtime.placer(mesh))
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
    pipeline = _with_fresh_adapter(pipeline, trained, encoder, mesh)
    put(pipeline, finished(workdir, PERSONALISE, of(pipeline, trained), trained))
    return pipeline, encoder


def add_fresh_lora(pipeline: pipelines.Pipeline, config: ConfigDict, mesh: Mesh | None = None) -> None:
    """Gives the UNet (`train.params=lora`), or every text encoder (`text_lora`), the LoRA that a stage trains; on the
    mesh, if there is one."""
    random_streams = {
        "lora": {"unet": "lora"},
        "text_lora": {"text_encoder": "text lora", "text_encoder_2": "text lora 2"},
        "all": {},
        "adapter": {},
    }[config.train.params]
    for name, model in pipeline.models.items():
        if name in random_streams:
            key = runtime.stream_key(config.seed, random_streams[name])
            add_lora(model, config.train.lora_rank, config.train.lora_alpha, nnx.Rngs(key))
            lora = nnx.state(model, nnx.LoRAParam)
            if mesh is not None:
                nnx.update(model, runtime.put(lora, runtime.shardings(lora, mesh)))


def of(pipeline: pipelines.Pipeline, config: ConfigDict) -> Params:
    """The policy's parameters in a loaded pipeline, in containers of their own."""
    return split(pipeline, config.train.params)[1]


def put(pipeline: pipelines.Pipeline, policy: Params) -> None:
    """Puts a policy into a loaded pipeline, in place."""
    nnx.update(pipeline.networks, policy)


def blocks_of(stage: str) -> str:
    """The UNet's blocks in which a stage's LoRA draws: `up` where photographs won, `all` before."""
    return "up" if stage in (CURRICULUM["hard"], NAIVE) else "all"


def _train_command(stage: str, workdir: Path) -> str:
    script = "stage0_sft" if stage == "stage0" else stage
    return f"python -m hgdpo_jax.main --config configs/{script}.py[:variant] --workdir {workdir}"


def stage_config(workdir: Path, stage: str) -> ConfigDict:
    """The config a stage was trained with. Raises UserError when it was not trained here."""
    path = workdir / stage / "config.json"
    if not path.is_file():
        raise UserError(f"{stage} was not trained in {workdir}; run first: {_train_command(stage, workdir)}")
    return configuration.from_json(json.loads(path.read_text()))


def last_stage(workdir: Path) -> str:
    """The highest stage that was started. Raises UserError when there is none."""
    for stage in reversed(STAGES):
        if (workdir / stage / "config.json").is_file():
            return stage
    raise UserError(f"no stage was trained in {workdir}; run first: {_train_command('stage1', workdir)}")


def made_from(workdir: Path, stage: str) -> dict[str, Any]:
    """What the newest checkpoint of a stage was made from, see :mod:`hgdpo_jax.provenance`; empty without one."""
    checkpoints = Checkpoints(workdir / stage, stage_config(workdir, stage).train.checkpoints)
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


def find_base(workdir: Path, config: ConfigDict, base: str | None) -> str:
    """Sets a run's `model.base` to where it is now; returns its content hash.

    Args:
        workdir: of the run.
        config: of a stage; changed.
        base: its new place, if it has one.

    Raises:
        UserError: it is not there, or is another than the stage was trained on.
    """
    config.model.base = base or config.model.base
    try:
        found = pipelines.content_hash(
            config.model.base, config.model.vae, config.model.lora, runtime.index_of(workdir)
        )
    except UserError as error:
        raise error if base else UserError(f"{error}; if it was moved, say where it is with --base") from error
    require_base(workdir, config.stage, found)
    return found


def finished(workdir: Path, stage: str, like: Params, config: ConfigDict) -> Params:
    """The policy that a stage handed on.

    Args:
        workdir, stage: of the run.
        like: a policy of the same shape, with the shardings to restore to.
        config: that the policy's network was made for: of a stage that scaled its LoRA otherwise, B is multiplied.

    Raises:
        UserError: the stage was not trained, or not to its end, or with another kind of policy.
    """
    wanted = stage_config(workdir, stage).train
    checkpoints = Checkpoints(workdir / stage, wanted.checkpoints)
    step = checkpoints.latest()
    if step is None or step < wanted.steps:
        raise UserError(
            f"{stage} stands at step {step or 0} of {wanted.steps}; run first: {_train_command(stage, workdir)}"
        )
    name = "ema" if wanted.ema else "policy"
    policy = checkpoints.restore(step, {name: like})[name]
    if not wanted.params.endswith("lora"):
        return policy
    own, given = (train.lora_alpha / train.lora_rank for train in (wanted, config.train))
    return policy if own == given else weighted(policy, own / given)
