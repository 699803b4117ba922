"""Says what a config's step needs on devices that are not here, by compiling it for them or by an estimate.

python -m hgdpo_jax.plan --config configs/stage3.py[:variant] --topology v5e:4x4 --topology rtx4090 [--largest]

See docs/plan.md.
"""

import argparse
from collections.abc import Sequence

from ml_collections import ConfigDict

from hgdpo_jax.config import CHECKPOINTING
from hgdpo_jax.run import command
from hgdpo_jax.run.settings import load_config


def parse(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, ConfigDict, list[str]]:
    """(arguments, validated config, its overrides)."""
    parser = command.config_parser("Says what a config's step needs of devices that are not here.")
    parser.add_argument("--topology", action="append", help="t4, rtx4090, a100-80gb:8, h100:64, v5e:4x4, cpu, others "
                        "(docs/plan.md); may be given more than once; default cpu")  # fmt: skip
    parser.add_argument("--largest", nargs="*", choices=CHECKPOINTING, metavar="CHECKPOINTING",
                        help="also find the largest batch, with none, blocks and everything or with these")  # fmt: skip
    parser.add_argument("--drawing", action="store_true", help="also plan drawing and decoding the pool's images")
    parser.add_argument("--share", type=_fraction, default=0.4, help="of the roofline that is reached; default 0.4")
    parser.add_argument("--json", action="store_true", help="print JSON")
    known, rest = parser.parse_known_args(arguments)
    overrides = command.overrides(rest)
    return known, load_config(known.config, overrides), overrides


def _fraction(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError("above 0, up to 1")
    return float(text)


def main() -> None:
    given, config, overrides = parse()

    from hgdpo_jax.planning.topologies import platform_of

    for name in given.topology or ():
        platform_of(name)  # raises at once where it does not exist: the imports that follow take seconds

    from hgdpo_jax.devices.start import start
    from hgdpo_jax.planning.plan import plan

    start()
    print(plan(given, config, overrides))


def cli() -> None:
    command.run(main)


if __name__ == "__main__":
    cli()
