"""Trains one stage.

python -m hgdpo_jax.main --config configs/stage1.py[:variant] --workdir W

A run that was stopped goes on from its newest checkpoint.
"""

from hgdpo_jax import command
from hgdpo_jax.training.loop import train


def main() -> None:
    train(*command.parse("Trains one stage."))


if __name__ == "__main__":
    command.run(main)
