"""The policy: which part of ε_base is trained."""

from dataclasses import replace

from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from hgdpo_jax.devices.random import stream_key
from hgdpo_jax.devices.sharding import heads_sharding, parameter_placer, tree_shardings
from hgdpo_jax.devices.transfer import place
from hgdpo_jax.diffusion import pipeline as pipelines
from hgdpo_jax.diffusion.source import open_source
from hgdpo_jax.faces.concepts import ConceptEncoder, encoder_of
from hgdpo_jax.models import ip_adapter
from hgdpo_jax.models.attention import set_sharding
from hgdpo_jax.models.lora import add_lora, lora_layers
from hgdpo_jax.models.text import Conditioner
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.training.step import Params, split_params


def load_trainable(
    config: ConfigDict, mesh: Mesh, *others: ConfigDict, weights: bool = True, text: Conditioner | None = None
) -> pipelines.Pipeline:
    """ε_base on the mesh, with a fresh LoRA or adapter where `train.params` asks for one. A fresh LoRA changes nothing.

    Trained parameters are float32, frozen ones have the dtype of the computation.

    Args:
        config: of a stage.
        mesh: to put the weights on.
        others: configs of further stages, for which fresh LoRA is added too.
        weights: whether ε_base's are read; otherwise its parameters are shapes, and those of LoRA alone have values.
        text: takes the place of the text encoders, which are then not read.
    """
    model, param_dtype = config.model, parameter_dtypes(config)
    if weights:
        pipeline = pipelines.load_pipeline(
            model.base,
            model.dtype,
            vae=model.vae,
            lora=model.lora,
            param_dtype=param_dtype,
            place=parameter_placer(mesh),
            text=text,
        )
    else:
        pipeline = pipelines.of_shapes(open_source(model.base, model.vae, model.lora), model.dtype, param_dtype)
    pipeline = configured(pipeline, config, mesh)
    for stage in (config, *others):
        add_fresh_lora(pipeline, stage, mesh)
        if stage.train.params == "adapter":
            pipeline = with_fresh_adapter(pipeline, stage, encoder_of(stage), mesh)
    return pipeline


def configured(pipeline: pipelines.Pipeline, config: ConfigDict, mesh: Mesh) -> pipelines.Pipeline:
    """The pipeline as a stage trains it: how its UNet (or transformer) is computed on the mesh, which activations are
    kept for the gradient, and how noise levels are drawn."""
    denoiser, train, family = pipeline.denoiser, config.train, pipeline.family
    if train.params not in family.trains:
        raise UserError(f"config key train.params={train.params}: not for {family.title}; expects "
                        f"{' or '.join(family.trains)}")  # fmt: skip
    denoiser.checkpoint(train.checkpointing)
    if train.blocks == "up":
        denoiser.share_skips()
    set_sharding(denoiser, heads_sharding(mesh))
    schedule = pipeline.schedule.in_training(train.noise_levels, train.noise_shift) if draws_otherwise(config) else None
    return replace(pipeline, schedule=schedule) if schedule else pipeline


def draws_otherwise(config: ConfigDict) -> bool:
    """Whether noise levels are not drawn uniformly."""
    return (config.train.noise_levels, config.train.noise_shift) != ("uniform", 1.0)


def parameter_dtypes(config: ConfigDict) -> dict[str, str]:
    """The dtype of each part's parameters: what is trained whole is float32."""
    frozen = config.model.dtype
    return {"denoiser": "float32" if config.train.params == "all" else frozen, "text": frozen}


def with_fresh_adapter(
    pipeline: pipelines.Pipeline, config: ConfigDict, encoder: ConceptEncoder, mesh: Mesh
) -> pipelines.Pipeline:
    """The pipeline with an adapter that has learnt nothing yet, for the features of `encoder`."""
    key = stream_key(config.seed, "adapter")
    adapter = ip_adapter.fresh(pipeline.denoiser, config.adapter.kind, encoder.nothing.shape[-1], nnx.Rngs(key))
    state = nnx.state(adapter)
    nnx.update(adapter, place(state, tree_shardings(state, mesh)))
    return replace(pipeline, adapter=adapter, no_concept=encoder.nothing)


def add_fresh_lora(pipeline: pipelines.Pipeline, config: ConfigDict, mesh: Mesh | None = None) -> None:
    """Adds the LoRA that a stage trains to the UNet (`train.params=lora`) or to every text encoder (`text_lora`), on
    the mesh if there is one."""
    streams = {
        "lora": {pipeline.family.denoiser: "lora"},
        "text_lora": {"text_encoder": "text lora", "text_encoder_2": "text lora 2"},
    }.get(config.train.params, {})
    for name, stream in streams.items():
        if name in pipeline.models:
            model, key = pipeline.models[name], stream_key(config.seed, stream)
            train = config.train
            add_lora(model, train.lora_rank, train.lora_alpha, nnx.Rngs(key), train.lora_modules)
            for path, layer in lora_layers(model).items():
                if train.blocks == "all" or "up_blocks" in path:  # the others are the reference's, which drops nothing
                    layer.dropout = train.lora_dropout
            lora = nnx.state(model, nnx.LoRAParam)
            if mesh is not None:
                nnx.update(model, place(lora, tree_shardings(lora, mesh)))


def policy_of(pipeline: pipelines.Pipeline, config: ConfigDict) -> Params:
    """The policy's parameters in a loaded pipeline, in containers of their own."""
    return split_params(pipeline, config.train.params)[1]


def set_policy(pipeline: pipelines.Pipeline, policy: Params) -> None:
    """Puts a policy into a loaded pipeline, in place."""
    nnx.update(pipeline.networks, policy)
