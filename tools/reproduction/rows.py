"""The rows, and the commands that train them.

python -m tools.reproduction.rows VARIANT             in their order: a command of this package, a config, arguments
python -m tools.reproduction.rows VARIANT RUN         the rows of a run's folder, as `evaluate --runs` takes them
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


_POOL = "--config.pairs.keep_candidates=true"
# A higher β and a smaller λ_stat than the easy stage's, and as many buckets as configs/baselines/curriculum_dpo.py has.
_HIGHER_BETA = {"portraits": "15000"}
_LESS_LAMBDA = {"portraits": "100000"}
_BUCKETS = {"portraits": 3}
# Each in all three stages, at equal steps and rates.
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


def rows(variant: str) -> list[Row]:
    """All rows. The paper's come first; the first that draws from the pool draws the largest, for all."""
    beta, weight = _HIGHER_BETA.get(variant, "25000"), _LESS_LAMBDA.get(variant, "1000")
    count = _BUCKETS.get(variant, 5)
    ranked = [command for k in range(1, count + 1) for command in _both(f"baselines/curriculum_dpo,{k}")]
    return [
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
        Row("SPIN", "spin_3", tuple(command for k in "123" for command in _both(f"baselines/spin,{k}"))),
        Row("Curriculum-DPO", f"curriculum_dpo_{count}", tuple(ranked)),
        *(Row(f"easy, pool of {n}", f"pool_{n}", _both(f"ablations/pool_size,{n}")) for n in (4, 8, 16)),
        *(Row(f"hard, t{t} wins", f"winner_t{t}", _both(f"ablations/winner,{t}")) for t in (2, 4)),
        Row("easy, less L_stat", f"lambda_stat_{weight}", (f"main ablations/lambda_stat,{weight}",)),
        _chain("reference = base", "reference_base_{}", "main ablations/reference,{}"),
        _chain("with the filter" if variant == "portraits" else "no filter", "other_filter_{}",
               "pairs ablations/filter,{}", "main ablations/filter,{}"),
        *(Row(f"hard, LoRA at weight {x}", f"hard+{x}") for x in ("0.5", "1")),
        Row("hard, LoRA in the up blocks", "hard+up"),
        Row("RealAlign's second stage", "realalign", _both("baselines/realalign")),
        *(_again(f"hard, {name.replace('_', ' ')}", name, settings) for name, settings in _OBJECTIVES.items()),
        *(_longer(variant, factor) for factor in (0.5, 2, 4)),
    ]  # fmt: skip


def _both(config: str) -> tuple[str, ...]:
    return f"pairs {config}", f"main {config}"


def _chain(name: str, stage: str, *commands: str) -> Row:
    """A row of two stages."""
    places = ("normal", "hard")
    return Row(name, stage.format("hard"), tuple(command.format(place) for place in places for command in commands))


def _again(name: str, folder: str, *settings: str) -> Row:
    """All three stages once more with other settings of `train`, the same ones or those of each."""
    commands, before = [], "base"
    for i, (stage, place) in enumerate((("stage1", "easy"), ("stage2", "normal"), ("stage3", "hard"))):
        given = " ".join(f"--config.train.{setting}" for setting in settings[i % len(settings)].split())
        commands.append(f"main {stage} --as {folder}_{place} --config.train.start={before} {given}")
        before = f"{folder}_{place}"
    return Row(name, before, tuple(commands))


def _longer(variant: str, factor: float) -> Row:
    """So many times the steps in each stage."""
    counts = [load_config(f"configs/{stage}.py:{variant}").train.steps for stage in ("stage1", "stage2", "stage3")]
    settings = (f"steps={round(factor * count)}" for count in counts)
    return _again(f"hard, steps × {factor:g}", f"steps_{factor:g}", *settings)


def too_fast(variant: str) -> dict[str, str]:
    """Objective → the normal stage with it, at ten times its rate, until the first alarm of the watchdog."""
    train = load_config(f"configs/stage2.py:{variant}").train
    looks = max(1, train.steps // 30)
    given = f"--config.train.lr={10 * train.lr:g} --config.train.eval_every={looks} --config.train.alarms=1"
    return {
        name: " ".join([f"main stage2 --as fast_{name} {given}", *(f"--config.train.{s}" for s in settings.split())])
        for name, settings in {"dpo": "", **_OBJECTIVES}.items()
    }


def command_lines(variant: str) -> list[str]:
    """What trains all rows, and what collapses."""
    lines = []
    for line in [line for row in rows(variant) for line in row.commands] + [*too_fast(variant).values()]:
        command, config, *arguments = line.split()
        file, comma, value = config.partition(",")
        lines.append(" ".join([command, f"configs/{file}.py:{variant}{comma}{value}", *arguments]))
    return lines


if __name__ == "__main__":
    variant, *runs = sys.argv[1:]
    print("\n".join([f"{run}:{row.drawn}" for run in runs for row in rows(variant)] or command_lines(variant)))
