"""Trains one stage.

python -m hgdpo_jax.main --config configs/stage1.py[:variant] --workdir W

A run that was stopped goes on from its newest checkpoint.
"""

import argparse
import re

from hgdpo_jax.run import command
from hgdpo_jax.run.errors import UserError


def steps_to_trace(text: str) -> range:
    """The steps 10 to 14 of `10:15`.

    Raises:
        UserError: it is no such range.
    """
    numbers = re.fullmatch(r"(\d+):(\d+)", text)
    steps = range(*map(int, numbers.groups())) if numbers else range(0)
    if not steps:
        raise UserError(f"argument --profile {text}: expects FIRST:END with FIRST less than END, such as 10:15")
    return steps


def main() -> None:
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    written = "writes a JAX trace of the steps from FIRST on and before END into W/stageN/logs"
    options.add_argument("--profile", metavar="FIRST:END", type=steps_to_trace, default=range(0), help=written)
    given, rest = options.parse_known_args()
    config, workdir = command.parse("Trains one stage.", rest, [options])

    from hgdpo_jax.devices.start import start
    from hgdpo_jax.training.loop import train

    start(workdir, command.asked(config), config.model.dtype)
    train(config, workdir, given.profile)


def cli() -> None:
    command.run(main)


if __name__ == "__main__":
    cli()
