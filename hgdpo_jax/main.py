"""Trains one stage.

python -m hgdpo_jax.main --config configs/stage1.py[:variant] --workdir W

A run that was stopped goes on from its newest checkpoint, with the same settings; with another learning rate, β, clip
norm, schedule or dtype where `--resume-with` names it.
"""

import re

from hgdpo_jax.run import command
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.remembered import remembering
from hgdpo_jax.training.changes import FLAG, changeable


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
    parser = command.run_parser("Trains one stage.")
    parser.add_argument("--profile", metavar="FIRST:END", type=steps_to_trace, default=range(0),
                        help="writes a JAX trace of steps FIRST to END - 1 into W/stageN/logs")  # fmt: skip
    parser.add_argument(FLAG, metavar="KEY,KEY", type=changeable, default=(),
                        help="goes on from a checkpoint that was made with other values of these settings, such as "
                        "train.lr,train.beta")  # fmt: skip
    command.add_name(parser)
    command.add_check(parser)
    config, given = command.parse(parser)
    if given.check and given.profile:
        raise UserError("--profile: does nothing here, --check trains no steps")

    from hgdpo_jax.checking.check import check_training
    from hgdpo_jax.devices.start import start
    from hgdpo_jax.run.processes import is_first
    from hgdpo_jax.training.loop import train

    start(given.workdir, command.as_arguments(config) | {FLAG: given.resume_with}, config.model,
          writes=not given.check)  # fmt: skip
    if given.check:
        check_training(config, given.workdir, given.resume_with)
        return
    with remembering(given.workdir, config, given.given, is_first()):
        train(config, given.workdir, given.profile, given.resume_with)


def cli() -> None:
    command.run(main)


if __name__ == "__main__":
    cli()
