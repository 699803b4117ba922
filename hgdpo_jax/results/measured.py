"""The models that an evaluation compares: which stages each draws with, and what draws them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from hgdpo_jax.devices.mesh import local_mesh
from hgdpo_jax.diffusion import recipe
from hgdpo_jax.diffusion.pipeline import Pipeline
from hgdpo_jax.diffusion.sampler import Sampler
from hgdpo_jax.faces.concepts import ConceptEncoder
from hgdpo_jax.run.folder import (
    CURRICULUM,
    GIVEN,
    NAIVE,
    PERSONALISE,
    SFT,
    TEXT_ENCODER,
    blocks_of,
    stage_config,
    was_started,
)
from hgdpo_jax.training.finished import finished_policy, with_trained_adapter
from hgdpo_jax.training.policy import load_trainable, policy_of


class Model(NamedTuple):
    """A model to measure: it draws with the policies of these stages together, under the recipe or as trained."""

    stages: tuple[str, ...]
    recipe: bool = True


BEST = "hard + text encoder"
_SINGLE = CURRICULUM | {"naive": NAIVE, "given": GIVEN}
MODELS: dict[str, Model] = {
    "base": Model(()),
    **{name: Model((stage,)) for name, stage in CURRICULUM.items()},
    BEST: Model((CURRICULUM["hard"], TEXT_ENCODER)),
    "naive": Model((NAIVE,)),
    "given": Model((GIVEN,)),
    **{f"{name}, whole": Model((stage,), recipe=False) for name, stage in _SINGLE.items()},
}
# Differences with intervals of their own: what the stages and the curriculum are to bring.
DIFFERENCES = (("hard", "base"), ("normal", "easy"), ("hard", "easy"), ("hard", "naive"))


def measured(config: ConfigDict, workdir: Path) -> dict[str, Model]:
    """The models to be measured: of the curriculum up to the config's stage, beside it what was trained of the others.

    A config of another stage measures that stage: `text_encoder` with what there is of the curriculum, `stage0` alone,
    since the others have another base.
    """
    models = dict(MODELS)
    if config.stage not in (PERSONALISE, *_SINGLE.values()):
        models |= {config.stage: Model((config.stage,)), f"{config.stage}, whole": Model((config.stage,), recipe=False)}
    asked = config.recipe
    whole = asked.weight == 1.0 and asked.blocks == "all"  # then nothing else is drawn without the recipe
    models = {name: model for name, model in models.items() if model.recipe or not whole}
    return {name: model for name, model in models.items() if _is_measured(config, workdir, model)}


def _is_measured(config: ConfigDict, workdir: Path, model: Model) -> bool:
    """Whether a model is to be measured; as trained beside the recipe only where there is one, for LoRA of the UNet."""
    curriculum = tuple(CURRICULUM.values())
    for stage in model.stages:
        if stage == config.stage:
            asked = True
        elif config.stage == SFT:
            asked = False
        elif stage in curriculum and config.stage != TEXT_ENCODER:
            asked = config.stage in curriculum and stage < config.stage
        else:
            asked = was_started(workdir, stage)
        if not asked or not (model.recipe or stage_config(workdir, stage).train.params == "lora"):
            return False
    return True


def _as_drawn(asked: ConfigDict, config: ConfigDict, stage: str, policy: Any, model: Model) -> Any:
    """A stage's policy as a model draws with it.

    Args:
        asked: the group `recipe` of the evaluation's config.
        config, stage, policy: of the stage.
        model: to draw.
    """
    if not model.recipe or config.train.params == "all":
        return policy
    return recipe.as_drawn(policy, blocks_of(stage, asked.blocks), asked.weight)


def single(models: Mapping[str, Model]) -> list[str]:
    """Base, and the models among these that draw with one stage under the recipe."""
    return [name for name, model in models.items() if model.recipe and len(model.stages) < 2]


class Drawing(NamedTuple):
    """Models whose UNets have the same parameters: what draws, with which policies, and what reads concept images."""

    pipeline: Pipeline
    sampler: Sampler
    policies: Mapping[str, Sequence[Any]]
    encoder: ConceptEncoder | None


def groups(models: Mapping[str, Model], configs: Mapping[str, ConfigDict]) -> list[dict[str, Model]]:
    """The models whose UNets have the same parameters together: LoRA of one rank, or all. What leaves the UNet as it is
    goes with the first."""
    found: dict[Any, dict[str, Model]] = {}
    others: dict[str, Model] = {}
    for name, model in models.items():
        kinds = [configs[stage].train for stage in model.stages if stage != TEXT_ENCODER]
        if kinds:
            lora = (kinds[0].lora_rank, *kinds[0].lora_modules) if kinds[0].params == "lora" else ()
            found.setdefault((kinds[0].params, lora), {})[name] = model
        else:
            others[name] = model
    first, *rest = found.values() or [{}]
    return [others | first, *rest]


def drawing_of(
    config: ConfigDict,
    workdir: Path,
    group: Mapping[str, Model],
    configs: Mapping[str, ConfigDict],
    step: str | None = None,
) -> Drawing:
    """Loads ε_base and the policies of a group, the config's stage at `step`. How the policies were trained is what
    their own configs say."""
    mesh, stages = local_mesh(), dict.fromkeys(stage for model in group.values() for stage in model.stages)
    own = config.copy_and_resolve_references()
    trained = next((configs[stage].train for stage in stages if stage != TEXT_ENCODER), None)
    own.train.params = "lora" if trained is None else trained.params  # a fresh LoRA changes nothing
    if trained is not None:
        own.train.update({name: trained[name] for name in ("lora_rank", "lora_alpha", "lora_modules")})
    text = [configs[stage] for stage in stages if stage == TEXT_ENCODER]
    pipeline, encoder = with_trained_adapter(load_trainable(own, mesh, *text), config.adapter, workdir, mesh)
    policies = {}
    for stage in stages:
        network = configs[stage] if stage == TEXT_ENCODER else own
        at = step if stage == config.stage else None
        policies[stage] = finished_policy(workdir, stage, policy_of(pipeline, network), network, at)
    return Drawing(
        pipeline,
        Sampler.from_config(pipeline, mesh, config.evaluate, config.seed),
        {
            name: [_as_drawn(config.recipe, configs[s], s, policies[s], model) for s in model.stages]
            for name, model in group.items()
        },
        encoder,
    )
