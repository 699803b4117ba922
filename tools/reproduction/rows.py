"""The rows, and the commands that train them.

python -m tools.reproduction.rows VARIANT PART        in their order: a command of this package, a config, arguments
python -m tools.reproduction.rows VARIANT PART RUN    the rows of a run's folder, as `evaluate --runs` takes them
"""

import sys
from typing import NamedTuple

from hgdpo_jax.run.settings import load_config


class Row(NamedTuple):
    """A row of the table.

    Attributes:
        name: as hgdpo_jax/assets/paper.json has it, or ours.
        drawn: what `evaluate --runs` writes behind the run's folder.
        commands: that train it after the rows above: a command, a config and what its variant is followed by,
            arguments.
    """

    name: str
    drawn: str
    commands: tuple[str, ...] = ()


PARTS = ("paper", "baselines", "ablations", "objectives", "lengths")
_POOL = "--config.pairs.keep_candidates=true"
# A higher β and a smaller λ_stat than the easy stage's, and as many buckets as configs/baselines/curriculum_dpo.py has.
_HIGHER_BETA = {"portraits": "1500"}
_LESS_LAMBDA = {"portraits": "100000"}
_BUCKETS = {"portraits": 3}
# The demo's easy stage takes half a minute and learns little. Here it takes as long as the normal stage, at its rate.
_EASY = "--config.train.steps=300 --config.train.lr=6e-3 --config.train.schedule=cosine"
_WHOLE = "--config.train.steps=750"
_LONGER = {
    "portraits": {
        "stage1": f"{_EASY} --config.train.beta=300",
        "ablations/pool_size": f"{_EASY} --config.train.beta=300",
        "ablations/lambda_stat": f"{_EASY} --config.train.beta=300",
        "ablations/beta": _EASY,
        "naive": _WHOLE,
        "ablations/all_pairs": _WHOLE,
        "baselines/realalign": _WHOLE,
        "baselines/spin": "--config.train.steps=250",
        "baselines/curriculum_dpo": "--config.train.steps=250",
    }
}
# RealAlign draws one trajectory of a photograph and HG-DPO more than twenty: in as many forward passes of the network
# it can take so many times the steps.
_EQUAL_FORWARDS = {"portraits": 4}
# Each in the normal stage, at equal steps and rate.
_OBJECTIVES = {
    "hinge": "objective=hinge",
    "ipo": "objective=ipo",
    "kto": "objective=kto",
    "dspo": "objective=dspo",
    "mapo": "objective=mapo lambda_stat=0 beta=5000",
    "smpo": "objective=smpo",
    "guarded": "safeguard=0.9",
    "with_sft": "sft_weight=1",
    "smoothed": "label_smoothing=0.1",
    "auto_beta": "auto_beta=0.2",
}


def rows(variant: str) -> dict[str, list[Row]]:
    """Part → its rows. The paper's come first; the first that draws from the pool draws the largest, for all."""
    beta, weight = _HIGHER_BETA.get(variant, "25000"), _LESS_LAMBDA.get(variant, "1000")
    count = _BUCKETS.get(variant, 5)
    ranked = [command for k in range(1, count + 1) for command in _both(f"baselines/curriculum_dpo,{k}")]
    whole = load_config(f"configs/baselines/realalign.py:{variant}", _settings(variant, "baselines/realalign")).train
    longer = f"--config.train.steps={_EQUAL_FORWARDS.get(variant, 4) * whole.steps}"
    paper = [
        Row("base", "base"),
        Row("easy", "easy", (f"pairs stage1 {_POOL} --config.pairs.pool_size=20", "main stage1")),
        Row("normal", "normal", (f"pairs stage2 {_POOL}", "main stage2")),
        Row("hard", "hard", (f"pairs stage3 {_POOL}", "main stage3")),
        Row("hard + text encoder", "hard+text_encoder", ("main text_encoder",)),
        Row("naive", "naive", (f"pairs naive {_POOL}", "main naive")),
        Row("all at once", "all_pairs", ("main ablations/all_pairs",)),
        _chain("hard without easy", "without_easy_{}", "main ablations/without_easy,{}"),
        Row("hard without normal", "without_normal", ("main ablations/without_normal",)),
        *(Row(f"{x} + SFT", f"sft_after_{x}", (f"main ablations/sft,{x}",)) for x in ("base", "easy", "normal")),
        Row("easy, pool of 2", "pool_2", _both("ablations/pool_size,2")),
        Row("easy without L_stat", "lambda_stat_0", ("main ablations/lambda_stat,0",)),
        Row("easy without L_stat, LAN", "lambda_stat_0+lan"),
        Row("easy without L_stat, higher beta", f"beta_{beta}", (f"main ablations/beta,{beta}",)),
        Row("hard, photographs as winners", "winner_t0", _both("ablations/winner,0")),
    ]  # fmt: skip
    baselines = [
        Row("SPIN", "spin_3", tuple(command for k in "123" for command in _both(f"baselines/spin,{k}"))),
        Row("Curriculum-DPO", f"curriculum_dpo_{count}", tuple(ranked)),
        Row("RealAlign's second stage", "realalign", _both("baselines/realalign")),
        Row("the same, equal forward passes", "realalign_longer",
            (f"main baselines/realalign --as realalign_longer {longer}",)),
    ]  # fmt: skip
    ablations = [
        *(Row(f"easy, pool of {n}", f"pool_{n}", _both(f"ablations/pool_size,{n}")) for n in (4, 8, 16)),
        *(Row(f"hard, t{t} wins", f"winner_t{t}", _both(f"ablations/winner,{t}")) for t in (2, 4)),
        Row("easy, less L_stat", f"lambda_stat_{weight}", (f"main ablations/lambda_stat,{weight}",)),
        _chain("reference = base", "reference_base_{}", "main ablations/reference,{}"),
        _chain("with the filter" if variant == "portraits" else "no filter", "other_filter_{}",
               "pairs ablations/filter,{}", "main ablations/filter,{}"),
        *(Row(f"hard, LoRA at weight {x}", f"hard+{x}") for x in ("0.5", "1")),
        Row("hard, LoRA in the up blocks", "hard+up"),
    ]  # fmt: skip
    others = [
        Row(f"normal, {name.replace('_', ' ')}", f"{name}_normal", (f"main stage2 --as {name}_normal {_of(settings)}",))
        for name, settings in _OBJECTIVES.items()
    ]
    lengths = [_longer(variant, factor) for factor in (0.5, 2, 4)]
    return dict(zip(PARTS, (paper, baselines, ablations, others, lengths), strict=True))


def _of(settings: str) -> str:
    return " ".join(f"--config.train.{setting}" for setting in settings.split())


def _settings(variant: str, config: str) -> list[str]:
    """What a reproduction takes other than a config says."""
    return _LONGER.get(variant, {}).get(config, "").replace("--config.", "").split()


def _both(config: str) -> tuple[str, ...]:
    return f"pairs {config}", f"main {config}"


def _chain(name: str, stage: str, *commands: str) -> Row:
    """A row of two stages."""
    places = ("normal", "hard")
    return Row(name, stage.format("hard"), tuple(command.format(place) for place in places for command in commands))


def _longer(variant: str, factor: float) -> Row:
    """All three stages once more in so many times the steps."""
    commands, before = [], "base"
    for stage, place in (("stage1", "easy"), ("stage2", "normal"), ("stage3", "hard")):
        steps = round(factor * load_config(f"configs/{stage}.py:{variant}", _settings(variant, stage)).train.steps)
        name = f"steps_{factor:g}_{place}"
        commands.append(f"main {stage} --as {name} {_of(f'start={before} steps={steps}')}")
        before = name
    return Row(f"hard, steps × {factor:g}", before, tuple(commands))


def too_fast(variant: str) -> dict[str, str]:
    """Objective → the normal stage with it, at ten times its rate, until the first alarm of the watchdog."""
    train = load_config(f"configs/stage2.py:{variant}").train
    looks = max(1, train.steps // 30)
    given = f"--config.train.lr={10 * train.lr:g} --config.train.eval_every={looks} --config.train.alarms=1"
    return {
        name: f"main stage2 --as fast_{name} {given} {_of(settings)}"
        for name, settings in {"dpo": "", **_OBJECTIVES}.items()
    }


def command_lines(variant: str, *parts: str) -> list[str]:
    """What trains the rows of some parts, or of all, and what collapses."""
    lines, parts = [], parts or PARTS
    for part in parts:
        commands = [command for row in rows(variant)[part] for command in row.commands]
        for line in commands + (list(too_fast(variant).values()) if part == "objectives" else []):
            command, config, *arguments = line.split()
            file, comma, value = config.partition(",")
            given = [f"--config.{setting}" for setting in _settings(variant, file)] if command == "main" else []
            lines.append(" ".join([command, f"configs/{file}.py:{variant}{comma}{value}", *given, *arguments]))
    return lines


if __name__ == "__main__":
    variant, part, *runs = sys.argv[1:]
    drawn = [row.drawn for row in [*rows(variant)["paper"][:4], *rows(variant)[part]]]  # beside base and three stages
    print("\n".join([f"{run}:{name}" for run in runs for name in dict.fromkeys(drawn)] or command_lines(variant, part)))
