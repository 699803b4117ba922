"""Builds a stage's pair shards: candidates from ε_base, their scores, winners and losers.

python -m hgdpo_jax.pairs --config configs/stage1.py[:variant] --workdir W [--check | --dry-run | --browse]

Shards appear one by one in W/stageN/pairs, the prompts of one group by group; a run that was stopped goes on with the
next group. Several processes make different shards. With `--browse` the page of hgdpo_jax.browse is written meanwhile.
"""

import argparse
from pathlib import Path

from hgdpo_jax.run import command
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.remembered import remembering


def prompts_to_draw(text: str) -> int:
    """A number of prompts. Raises UserError where it is none."""
    if not text.isdecimal() or not int(text):
        raise UserError(f"argument --dry-run {text}: expects a number of prompts from 1")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = command.run_parser("Builds a stage's pair shards.")
    instead = parser.add_mutually_exclusive_group()
    command.add_check(instead)
    instead.add_argument("--dry-run", metavar="N", nargs="?", type=prompts_to_draw, const=1, default=0,
                         help="draws the first N prompts in memory, as many as fill whole batches unless given, and "
                         "says how long all would take; writes nothing into W")  # fmt: skip
    instead.add_argument("--browse", action="store_true", help="writes the page of the run's pairs, "
                         "W/browse/index.html, while they are made; see hgdpo_jax.browse")  # fmt: skip
    parser.add_argument("--sheet", metavar="FILE.png", type=Path, help="of a dry run: shows what it drew")
    return parser


def main() -> None:
    config, given = command.parse(_parser())
    if given.sheet and not given.dry_run:
        raise UserError(f"--sheet {given.sheet}: does nothing here, it goes with --dry-run")
    if given.browse and config.pairs.loser == "none":
        raise UserError(f"--browse: {config.stage} has no losers, of which the page is; leave it out")

    from hgdpo_jax.browsing.page import PairsPage
    from hgdpo_jax.checking.check import check_pairs
    from hgdpo_jax.curriculum.build import build
    from hgdpo_jax.curriculum.dry_run import dry_run
    from hgdpo_jax.devices.start import start
    from hgdpo_jax.run.processes import is_first

    builds = not (given.check or given.dry_run)
    start(given.workdir, command.as_arguments(config), config.model, writes=builds)
    if given.check:
        check_pairs(config, given.workdir)
    if given.dry_run:
        dry_run(config, given.workdir, given.dry_run, given.sheet)
    if builds:
        with remembering(given.workdir, config, given.given, is_first()):
            page = PairsPage(given.workdir) if given.browse else None
            build(config, given.workdir, page.keep_up if page else None)
            if page and is_first():
                print(page.write())


def cli() -> None:
    command.run(main)


if __name__ == "__main__":
    cli()
