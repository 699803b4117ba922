"""What a report says of its run in words: the facts at its head, and a line for each model."""

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from hgdpo_jax import __version__
from hgdpo_jax.config import resolutions
from hgdpo_jax.results.measured import BEST, Stages
from hgdpo_jax.run.folder import pair_stages
from hgdpo_jax.run.places import places
from hgdpo_jax.run.settings import CURRICULUM

_MEANINGS = {
    "base": "the checkpoint that the run began with",
    "easy": "first stage: the best of base's drawings won against the worst",
    "normal": "second stage: photographs that base noised and redrew won against easy's winners",
    "hard": "third stage: almost untouched photographs won against normal's winners",
    BEST: "hard, with the trained text encoder while the layout is decided",
    "naive": "photographs won against drawings in one stage, without the curriculum: what that is compared with",
    "given": "preference pairs that were given",
}
_BLOCKS = {
    "paper": "in the paper's blocks of the UNet",
    "all": "in all blocks of the UNet",
    "up": "in the UNet's up blocks",
}
PHOTOGRAPH = "photograph"  # what a report calls them in a row of models


def model_lines(models: Mapping[str, Stages], configs: Mapping[str, ConfigDict]) -> dict[str, str]:
    """Model → what it is and how it was trained; the photographs are among them.

    Args:
        models: that were measured.
        configs: of their stages.
    """
    lines = {name: _line(name, stages, configs) for name, stages in models.items()}
    return lines | {PHOTOGRAPH: "of which the models drew the caption; no stage has seen it"}


def first_beside_base(models: Sequence[str], again: str = "") -> str:
    """Of models that draw with one stage, base the first of them, the one that a report first shows beside base.

    Args:
        models: their names.
        again: the one that was trained on another's pairs (`--as`), which is asked for. Without: the last of the
            curriculum, else what was trained last, else the photographs.
    """
    curriculum = [name for name in models if name in CURRICULUM]
    return again or [PHOTOGRAPH, *models[1:], *curriculum][-1]


def _line(name: str, stages: Stages, configs: Mapping[str, ConfigDict]) -> str:
    if not stages:
        return _MEANINGS[name]
    config, paper = configs[stages[-1]], {stage: own for own, stage in CURRICULUM.items()}
    named = [paper.get(stage, stage) for stage in pair_stages(config)]
    listed = " and ".join([", ".join(named[:-1]), named[-1]] if named[1:] else named)
    other = f"trained on the pairs of {listed}" if config.train.pairs else "a stage of this run"
    return f"{_MEANINGS.get(name, other)}. {_trained(config)}"


def _trained(config: ConfigDict) -> str:
    train, each = config.train, "pairs" if config.train.objective != "sft" else "photographs"
    what = f"LoRA of rank {train.lora_rank}" if "lora" in train.params else "all parameters"
    beta = f", β\u00a0{train.beta:g}" if config.train.objective != "sft" else ""
    return f"{train.steps:,} steps of {train.batch} {each}, {what}, learning rate {train.lr:g}{beta}"


def head(
    config: ConfigDict, base: str, people: int, shown: int, configs: Mapping[str, ConfigDict], step: str | None = None
) -> dict[str, str]:
    """Title → fact about an evaluation.

    Args:
        config: of the evaluation.
        base: hash of the base.
        people: held-out captions that were drawn.
        shown: of them, those on the page.
        configs: of the stages that were measured.
        step: the checkpoint of the config's stage that was asked for.
    """
    asked, paper = config.evaluate, {stage: name for name, stage in CURRICULUM.items()}
    count, size = asked.images_per_prompt, next(iter(resolutions(config).values()))
    trained = [f"{paper.get(stage, stage.replace('_', ' '))} {each.train.steps:,}" for stage, each in configs.items()]
    judges = [*_names(asked.scorer), *_names(asked.other_scorer)]
    choosing = _names(config.pairs.scorer)
    first = f"; its scores are {choosing[0]}'s" if len(choosing) > 1 else ""
    found = {
        "Base": f"{_name(config.model.base)}, sha256 {base[:12]}…",
        "Evaluated": f"{datetime.date.today()}, hgdpo_jax {__version__}",
        "Steps of training": ", ".join(trained)
        + (f"; {config.stage} is drawn at its checkpoint {step}" if step else ""),
        "Pictures": f"{count * people:,} of each model, {size[0]}×{size[1]} (height × width): {count} for each of "
        f"{people:,} held-out captions of {_name(config.data.photographs)}; the page shows one for each of {shown}",
        "Drawn with": f"{asked.sampler}, {asked.steps} steps, guidance {asked.guidance:g}, seed {config.seed}; "
        f"LoRA at weight {config.recipe.weight:g}, {_BLOCKS[config.recipe.blocks]}",
        "Judges": f"{' and '.join(judges)}; they chose no winners" if judges else "",
        "Scorer": f"{' and '.join(choosing)}, which chose the winners{first}" if choosing else "",
        "Further scorers": ", ".join(_names(asked.scorers)),
    }
    return {title: fact for title, fact in found.items() if fact}


def _names(scorers: str) -> list[str]:
    return [str(place._replace(path=_name(place.path))) for place in places(scorers)]


def _name(path: str) -> str:
    """The end of a path: a report is shown to people whom the rest of it does not concern."""
    return "/".join(Path(path).parts[-2:])
