"""Floating-point operations of an optimizer step, counted on the traced step without running it.

python -m benchmarks.step_cost CONFIG:VARIANT [--config.train.batch=8 …]

VARIANT is sd15 or sdxl, whose architecture is taken; `model.base` is not read.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from hgdpo_jax import config as configuration
from hgdpo_jax.diffusion.pipeline import MODELS, Pipeline
from hgdpo_jax.diffusion.schedule import NoiseSchedule
from hgdpo_jax.models.architectures import SD15, SDXL, Architecture
from hgdpo_jax.models.convert import abstract
from hgdpo_jax.models.lora import add_lora
from hgdpo_jax.models.text import TextConditioner
from hgdpo_jax.training import step as steps
from hgdpo_jax.training.cost import operations
from hgdpo_jax.training.optimizer import make_optimizer, numbers_of


def shapes_only(architecture: Architecture, dtype: str) -> Pipeline:
    """The pipeline that :func:`hgdpo_jax.diffusion.pipeline.load` would give, without weights and tokenizers."""
    models = {part: abstract(MODELS[part], config, jnp.dtype(dtype)) for part, config in architecture.configs.items()}
    text = TextConditioner(
        models["text_encoder"],
        models.get("text_encoder_2"),
        empty_ids=(49406,) + 76 * (49407,),
        zero_empty=bool(architecture.index.get("force_zeros_for_empty_prompt", False)),
    )
    schedule = NoiseSchedule.from_config(architecture.scheduler)
    return Pipeline(models["unet"], models["vae"], text, {}, schedule, architecture.scheduler, architecture.index, None)


def trace_step(config: ConfigDict, architecture: Architecture) -> jax.stages.Traced:
    """The jitted step of a config (LoRA of the UNet, or the whole UNet)."""
    settings, pipeline = config.train, shapes_only(architecture, config.model.dtype)
    pipeline.unet.checkpoint(settings.checkpointing)
    if settings.params == "lora":
        add_lora(pipeline.unet, settings.lora_rank, settings.lora_alpha, nnx.Rngs(0))
    denoiser, policy, frozen = steps.split(pipeline, settings.params)
    loss = {"dpo": steps.dpo_loss, "sft": steps.sft_loss}[config.objective](denoiser, pipeline.schedule)
    tx = make_optimizer(settings)
    step = steps.make_step(loss, tx, settings.accumulate)

    def shapes(tree: Any, dtype: Any = None) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype), tree)

    resolution = next(iter(configuration.resolutions(config).values()))
    latent = jax.ShapeDtypeStruct((settings.batch, *pipeline.latent_shape(resolution)), jnp.float16)
    batch = {"winner": latent, "input_ids": jax.ShapeDtypeStruct((settings.batch, 77), jnp.int32)}
    reference: Any = {}
    if config.objective == "dpo":
        batch, reference = batch | {"loser": latent}, shapes(policy)
    state = shapes(jax.eval_shape(lambda p: steps.init_state(p, tx, settings.ema), policy))
    frozen = shapes(frozen, jnp.dtype(config.model.dtype))
    return step.trace(state, reference, frozen, shapes(batch), numbers_of(config, 0))


def main() -> None:
    parser = argparse.ArgumentParser(description="Floating-point operations of a step.")
    parser.add_argument("config")
    given, overrides = parser.parse_known_args()
    config = configuration.load(given.config, [value.removeprefix("--config.") for value in overrides])
    architecture = {"sd15": SD15, "sdxl": SDXL}[given.config.partition(":")[2]]
    count = operations(trace_step(config, architecture).jaxpr)
    print(f"{given.config} {' '.join(overrides)}: {count / 1e12:.1f} TFLOP a step")


if __name__ == "__main__":
    main()
