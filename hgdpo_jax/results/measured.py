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
    pair_stages,
    stage_config,
    was_started,
)
from hgdpo_jax.training.finished import finished_policy, with_trained_adapter
from hgdpo_jax.training.policy import load_trainable, policy_of

Stages = tuple[str, ...]  # a model to measure: it draws with the policies of these stages together, under the recipe
BEST = "hard + text encoder"
_SINGLE = CURRICULUM | {"naive": NAIVE, "given": GIVEN}
MODELS: dict[str, Stages] = {
    "base": (),
    **{name: (stage,) for name, stage in CURRICULUM.items()},
    BEST: (CURRICULUM["hard"], TEXT_ENCODER),
    "naive": (NAIVE,),
    "given": (GIVEN,),
}
_DIFFERENCES = (("hard", "base"), ("normal", "easy"), ("hard", "easy"), ("hard", "naive"))


def differing(config: ConfigDict) -> tuple[tuple[str, str], ...]:
    """The pairs of models whose differences have intervals of their own: what the stages and the curriculum are to
    bring, and a stage under another name against the one whose pairs it has."""
    same = [(config.stage, name) for name, stage in _SINGLE.items() if stage in pair_stages(config)]
    return (*_DIFFERENCES, *same, *((name, "base") for name, _ in same))


def measured(config: ConfigDict, workdir: Path) -> dict[str, Stages]:
    """The models to be measured: of the curriculum up to the config's stage, beside it what was trained of the others.
    Of the stages before, those have to be there that it started from, one from the other.

    A config of another stage measures that stage: `text_encoder`, and what stands beside the curriculum, with what
    there is of that; `naive` and `given` without it, and `stage0` alone, since the others have another base.
    """
    models = dict(MODELS)
    if config.stage not in (PERSONALISE, *_SINGLE.values()):
        models |= {config.stage: (config.stage,)}
    needed = starts(config, workdir)
    return {name: stages for name, stages in models.items() if _is_measured(config, workdir, stages, needed)}


def starts(config: ConfigDict, workdir: Path) -> list[str]:
    """The stages that a stage started from, one from the other, the last one first. Raises UserError where one was not
    trained."""
    found: list[str] = []
    while config.train.start != "base" and config.train.start not in found:
        found.append(config.train.start)
        config = stage_config(workdir, found[-1])
    return found


def _is_measured(config: ConfigDict, workdir: Path, stages: Stages, needed: Sequence[str]) -> bool:
    """Whether a model is to be measured.

    Args:
        config: of the evaluation.
        workdir: of the run.
        stages: of the model.
        needed: stages that have to be there.
    """
    curriculum = tuple(CURRICULUM.values())
    for stage in stages:
        if stage == config.stage:
            asked = True
        elif config.stage == SFT:
            asked = False
        elif stage in curriculum and config.stage in (*curriculum, NAIVE, GIVEN, PERSONALISE):
            before = config.stage in curriculum and stage < config.stage
            asked = stage in needed or (before and was_started(workdir, stage))
        else:
            asked = was_started(workdir, stage)
        if not asked:
            return False
    return True


def _as_drawn(asked: ConfigDict, config: ConfigDict, policy: Any) -> Any:
    """A stage's policy as a model draws with it.

    Args:
        asked: the group `recipe` of the evaluation's config.
        config, policy: of the stage.
    """
    if config.train.params == "all":
        return policy
    return recipe.as_drawn(policy, blocks_of(config, asked.blocks), asked.weight)


def single(models: Mapping[str, Stages]) -> list[str]:
    """Base, and the models among these that draw with one stage."""
    return [name for name, stages in models.items() if len(stages) < 2]


class Drawing(NamedTuple):
    """Models whose UNets have the same parameters: what draws, with which policies, and what reads concept images."""

    pipeline: Pipeline
    sampler: Sampler
    policies: Mapping[str, Sequence[Any]]
    encoder: ConceptEncoder | None


def groups(models: Mapping[str, Stages], configs: Mapping[str, ConfigDict]) -> list[dict[str, Stages]]:
    """The models whose UNets have the same parameters together: LoRA of one rank, or all. What leaves the UNet as it is
    goes with the first."""
    found: dict[Any, dict[str, Stages]] = {}
    others: dict[str, Stages] = {}
    for name, stages in models.items():
        kinds = [configs[stage].train for stage in stages if stage != TEXT_ENCODER]
        if kinds:
            lora = (kinds[0].lora_rank, *kinds[0].lora_modules) if kinds[0].params == "lora" else ()
            found.setdefault((kinds[0].params, lora), {})[name] = stages
        else:
            others[name] = stages
    first, *rest = found.values() or [{}]
    return [others | first, *rest]


def drawing_of(
    config: ConfigDict,
    workdir: Path,
    group: Mapping[str, Stages],
    configs: Mapping[str, ConfigDict],
    step: str | None = None,
) -> Drawing:
    """Loads ε_base and the policies of a group, the config's stage at `step`. How the policies were trained is what
    their own configs say."""
    mesh, stages = local_mesh(), dict.fromkeys(stage for used in group.values() for stage in used)
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
            name: [_as_drawn(config.recipe, configs[stage], policies[stage]) for stage in used]
            for name, used in group.items()
        },
        encoder,
    )
