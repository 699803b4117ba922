"""Trains one stage.

python -m hgdpo_jax.main --config configs/stage1.py[:variant] --workdir W

A run that was stopped goes on from its newest checkpoint.
"""

import argparse

from hgdpo_jax import command
from hgdpo_jax.training.loop import train
from hgdpo_jax.training.speed import steps_to_trace


def main() -> None:
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    written = "writes a JAX trace of the steps from FIRST on and before END into W/stageN/logs"
    options.add_argument("--profile", metavar="FIRST:END", type=steps_to_trace, default=range(0), help=written)
    given, rest = options.parse_known_args()
    train(*command.parse("Trains one stage.", rest, [options]), given.profile)


if __name__ == "__main__":
    command.run(main)
