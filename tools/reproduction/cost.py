"""What the rows of a seed cost on a device that need not be here: python -m tools.reproduction.cost VARIANT [TOPOLOGY]

The devices' part alone, as hgdpo_jax.plan reckons it for the stages of the curriculum: training, and what is drawn of
each photograph. Scoring, evaluation and starting are left out.
"""

import contextlib
import io
import json
import sys

from hgdpo_jax import plan
from hgdpo_jax.run.settings import load_config
from tools.reproduction.rows import command_lines


def examples_of(variant: str) -> int:
    """Pairs, or photographs, that all rows of a seed learn from, each time that it is taken."""
    trained = [line.split() for line in command_lines(variant) if line.startswith("main ")]
    configs = [load_config(spec, _settings(rest)) for _, spec, *rest in trained]
    return sum(config.train.steps * config.train.batch for config in configs)


def pictures_of(variant: str) -> float:
    """Whole trajectories that all rows of a seed draw of a photograph: the largest pool, and each reconstruction once,
    which takes its strength's part of one."""
    pool, strengths = 0, set()
    for _, spec, *rest in (line.split() for line in command_lines(variant) if line.startswith("pairs ")):
        pairs = load_config(spec, _settings(rest)).pairs
        if "pool" in (pairs.winner, pairs.loser):
            pool = max(pool, pairs.pool_size)
        if "sdrecon" in (pairs.winner, pairs.loser):
            strengths |= {(pairs.redraw, strength) for strength in pairs.strengths}
    return pool + sum(strength for _, strength in strengths) / 10


def _settings(arguments: list[str]) -> list[str]:
    """Of a line, those that are settings."""
    return [each.removeprefix("--config.") for each in arguments if each.startswith("--config.")]


def cost(variant: str, topology: str) -> str:
    """A line for people."""
    given, config, overrides = plan.parse(
        ["--config", f"configs/stage3.py:{variant}", "--topology", topology, "--drawing", "--json"]
    )
    from hgdpo_jax.planning.plan import plan as planned

    with contextlib.redirect_stderr(io.StringIO()):  # where the compiler is not installed: an estimate is enough here
        (found,) = json.loads(planned(given, config, overrides))
    hours = examples_of(variant) / found["examples_per_second"] / 3600
    drawing = found["drawing"]
    each = pictures_of(variant) * max(drawing["seconds"].values()) / (found["share"] * drawing["examples"])
    return (
        f"{len(command_lines(variant))} commands a seed. On one {topology}, as planned and not run: {hours:,.0f} hours "
        f"of training, and {each:,.1f} seconds of drawing for each photograph"
    )


if __name__ == "__main__":
    print(cost(sys.argv[1], sys.argv[2] if sys.argv[2:] else "h100"))
