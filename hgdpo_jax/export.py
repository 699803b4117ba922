"""A run's last stage → what other programs load: a diffusers folder or one file in LDM's layout, with the LoRA merged
as the recipe draws with it; LoRA files of PEFT and kohya; the recipe.

python -m hgdpo_jax.export --workdir W --out DIR [--stage stage3] [--step STEP] [--format diffusers,peft,kohya,ldm]
    [--merge recipe|whole] [--base DIR]
"""

import argparse

from hgdpo_jax.run import command
from hgdpo_jax.run.folder import local_folder


def main() -> None:
    parser = argparse.ArgumentParser(description="Exports a run to diffusers, PEFT and kohya.")
    parser.add_argument("--workdir", required=True, type=local_folder, help="folder of the run")
    parser.add_argument("--out", required=True, type=local_folder, help="folder to write")
    parser.add_argument("--stage", help="easy, normal, hard, or the stage's folder; the last one that was "
                        "started unless given")  # fmt: skip
    command.add_step(parser)
    parser.add_argument("--format", help="some of diffusers,peft,kohya,ldm, with commas between; all but ldm unless "
                        "given; of a stage that trained all parameters diffusers and ldm")  # fmt: skip
    parser.add_argument("--merge", choices=("recipe", "whole"), help="how the LoRA is merged into the diffusers folder "
                        "and into ldm's file: as the recipe draws with it (default), or whole")  # fmt: skip
    parser.add_argument("--base", help="where the run's base model is now, if it was moved")
    given = parser.parse_args()
    formats = given.format.split(",") if given.format else None

    from hgdpo_jax.devices.start import start
    from hgdpo_jax.results.exported import export

    start(given.workdir, vars(given), writes=False)
    export(given.workdir, given.out, given.stage, formats, given.base, given.merge, given.step)


def cli() -> None:
    command.run(main)


if __name__ == "__main__":
    cli()
