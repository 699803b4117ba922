"""A page of a run's pairs, on which they can be rated; and a study, in which people compare what two models drew.

python -m hgdpo_jax.browse --workdir W                        W/browse/index.html, of what pairs there are so far
python -m hgdpo_jax.browse --workdir W --reconstructions      the same, with all reconstructions of the photographs
python -m hgdpo_jax.browse --workdir W --study base hard      W/study/ID.html, of what evaluate drew

The pages are static: open them from disk, or copy them. Run again, the first shows what has come since.
"""

import argparse

from hgdpo_jax.run import command
from hgdpo_jax.run.folder import local_folder


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes a page of a run's pairs, or of a study of its drawings.")
    parser.add_argument("--workdir", required=True, type=local_folder, help="folder of the run")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--reconstructions", action="store_true", help="draw again, from the same seeds, those "
                      "reconstructions of each photograph that did not win; takes as long as pairs")  # fmt: skip
    what.add_argument("--study", nargs=2, metavar=("MODEL", "MODEL"), help="a study of what two models drew, such as "
                      "base and hard, instead of the pairs; evaluate --study reads the answers")  # fmt: skip
    given = parser.parse_args()
    if given.study:
        from hgdpo_jax.browsing.study import write_study

        print(write_study(given.workdir, *given.study))
    else:
        from hgdpo_jax.browsing.page import PairsPage
        from hgdpo_jax.devices.start import start

        start(given.workdir)
        print(PairsPage(given.workdir, given.reconstructions).write())


def cli() -> None:
    command.run(main)


if __name__ == "__main__":
    cli()
