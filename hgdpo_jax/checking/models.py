"""Whether the networks that a stage names are there, whole, and of one kind. Headers are read, no weights."""

import math
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from hgdpo_jax import config as configuration
from hgdpo_jax.data.photographs import Photograph
from hgdpo_jax.diffusion import pipeline as pipelines
from hgdpo_jax.diffusion.pipeline import Pipeline
from hgdpo_jax.diffusion.sdrecon import sdrecon
from hgdpo_jax.diffusion.source import Source
from hgdpo_jax.diffusion.stable_diffusion import POSITIONS, tokenize
from hgdpo_jax.diffusion.trajectory import from_noise
from hgdpo_jax.faces.concepts import encoder_hash
from hgdpo_jax.models.clip import CLIPModel
from hgdpo_jax.models.convert import keys, parameters, require_fit
from hgdpo_jax.models.weights import Weights
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.index import Index
from hgdpo_jax.run.places import SCORERS
from hgdpo_jax.run.settings import get_setting, named
from hgdpo_jax.scoring.comparison import columns
from hgdpo_jax.scoring.scorers import listed, parts


def require_base(config: ConfigDict, source: Source) -> Pipeline:
    """ε_base with shapes in place of its parameters. Raises UserError where its weights do not fit its configs."""
    pipeline = pipelines.of_shapes(source, config.model.dtype)
    for part, model in pipeline.models.items():
        weights = source.open(part, keys(model))
        require_fit(weights, model, f"{source.name}, {part}", source.expected(part))
    return pipeline


def latents(config: ConfigDict, pipeline: Pipeline) -> dict[str, tuple[int, int, int]]:
    """Resolution → (h, w, c) of its latents. Raises UserError for a resolution that the model cannot compute."""
    return {name: pipeline.latent_shape(size) for name, size in configuration.resolutions(config).items()}


def describe_base(source: Source, pipeline: Pipeline) -> str:
    """Its name and the sizes of its parts."""
    counts = {part: sum(math.prod(x.shape) for x in parameters(m).values()) for part, m in pipeline.models.items()}
    return f"base {source.name}, parameters: {', '.join(f'{part} {count:,}' for part, count in counts.items())}"


def require_samplers(config: ConfigDict, pipeline: Pipeline) -> None:
    """Raises UserError where the base's schedule has no such steps as those that pairs, log and report are drawn in, or
    the base draws without guidance."""
    for group in ("pairs", "evaluate"):
        sampler, steps = config[group].sampler, config[group].steps
        pipeline.require_guidance(config[group].guidance)
        with named(f"{group}.steps", steps):
            from_noise(pipeline.schedule, sampler, steps)
            if group == "pairs" and "sdrecon" in (config.pairs.winner, config.pairs.loser):
                for strength in config.pairs.strengths:
                    sdrecon(pipeline.schedule, sampler, steps, strength)


def require_scorers(config: ConfigDict, pipeline: Pipeline, photographs: Sequence[Photograph]) -> list[str]:
    """A line for each scorer and judge that is set.

    Args:
        config: of the stage.
        pipeline: whose first tokenizer's ids they read.
        photographs: whose captions they will read.

    Raises:
        UserError: one is missing or not whole, or does not know the tokens of a caption.
    """
    lines = []
    for key in SCORERS:
        text = get_setting(config, key)
        with named(key, text):
            for place in (columns if key == "evaluate.scorers" else listed)(text):
                for network in parts(place).networks:
                    require_fit(network.weights, network.model, network.place, network.expected_by)
                    if isinstance(network.model, CLIPModel):
                        _require_tokens(network.model, pipeline, photographs)
                lines.append(f"{key} {place.path}: fits")
    return lines


def _require_tokens(model: CLIPModel, pipeline: Pipeline, photographs: Sequence[Photograph]) -> None:
    """Raises UserError where a model that reads captions does not know a token of one."""
    table = dict((key, x.shape) for key, x in zip(keys(model), parameters(model).values(), strict=True))
    words, positions = (table[f"text_model.embeddings.{name}_embedding.weight"][0] for name in ("token", "position"))
    if positions < POSITIONS:
        raise UserError(f"reads {positions} tokens of a caption, the base {POSITIONS}; take another scorer")
    tokenizer = pipeline.tokenizers["tokenizer"]
    if max(tokenizer.get_vocab().values()) < words:
        return
    for photograph in photographs:
        if tokenize(tokenizer, [photograph.caption]).max() >= words:
            raise UserError(f"does not know all tokens of the caption {photograph.caption!r} of {photograph.id}, which "
                            "the base's tokenizer has for itself; write it in other words")  # fmt: skip


def require_adapter(config: ConfigDict, index: Index) -> list[str]:
    """Lines of an adapter that is given, or of what one that is trained reads.

    Raises:
        UserError: a file is missing or not whole.
    """
    lines, weights = [], config.adapter.weights
    if weights:
        with named("adapter.weights", weights):
            Weights(Path(weights))
        lines.append(f"adapter.weights {weights}: whole")
    if config.train.params == "adapter":
        encoder_hash(config, index)
        lines.append("the encoder of concept images: whole")
    return lines
