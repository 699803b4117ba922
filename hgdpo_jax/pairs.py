"""Builds a stage's pair shards: candidates from ε_base, their scores, winners and losers.

python -m hgdpo_jax.pairs --config configs/stage1.py[:variant] --workdir W

Shards appear one by one in W/stageN/pairs, the prompts of one group by group; a run that was stopped goes on with the
next group. Several processes make different shards.
"""

from hgdpo_jax.run import command
from hgdpo_jax.run.remembered import remembering


def main() -> None:
    config, given = command.parse(command.run_parser("Builds a stage's pair shards."))

    from hgdpo_jax.curriculum.build import build
    from hgdpo_jax.devices.start import start
    from hgdpo_jax.run.processes import is_first

    start(given.workdir, command.as_arguments(config), config.model.dtype)
    with remembering(given.workdir, config, given.given, is_first()):
        build(config, given.workdir)


def cli() -> None:
    command.run(main)


if __name__ == "__main__":
    cli()
