"""What a run folder is: its stages by name, their configs, and the commands that make them."""

import json
from pathlib import Path

from ml_collections import ConfigDict

from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.settings import config_from_json

CURRICULUM = {"easy": "stage1", "normal": "stage2", "hard": "stage3"}  # the paper's name → our folder
GIVEN = "given"  # one stage of pairs that exist already
STAGES = ("stage0", GIVEN, *CURRICULUM.values())
DRAWN_STAGES = {"base": None, GIVEN: GIVEN, **CURRICULUM}  # what `sample --stage` takes → our folder
BLOCKS = ("all", "up", "up+normal")  # of the UNet, in which a stage's LoRA can draw
# Stages beside the curriculum; `naive` is what it is compared with.
TEXT_ENCODER, PERSONALISE, NAIVE = "text_encoder", "personalise", "naive"


def blocks_of(stage: str) -> str:
    """The UNet's blocks in which a stage's LoRA draws: `up` where photographs won, `all` before."""
    return "up" if stage in (CURRICULUM["hard"], NAIVE) else "all"


def train_command(stage: str, workdir: Path) -> str:
    script = "stage0_sft" if stage == "stage0" else stage
    return f"python -m hgdpo_jax.main --config configs/{script}.py[:variant] --workdir {workdir}"


def stage_config(workdir: Path, stage: str) -> ConfigDict:
    """The config a stage was trained with. Raises UserError when it was not trained here."""
    path = workdir / stage / "config.json"
    if not path.is_file():
        raise UserError(f"{stage} was not trained in {workdir}; run first: {train_command(stage, workdir)}")
    return config_from_json(json.loads(path.read_text()))


def last_stage(workdir: Path) -> str:
    """The highest stage that was started. Raises UserError when there is none."""
    for stage in reversed(STAGES):
        if (workdir / stage / "config.json").is_file():
            return stage
    raise UserError(f"no stage was trained in {workdir}; run first: {train_command('stage1', workdir)}")
