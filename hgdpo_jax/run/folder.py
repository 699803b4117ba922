"""What a run folder is: where it can lie, its stages by name, their configs, and the commands that make them."""

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


def local_folder(text: str) -> Path:
    """A folder as a command line names it.

    Raises:
        UserError: an address of object storage, which knows neither renames nor locks.
    """
    if "://" in text:
        raise UserError(f"{text}: is object storage, which has no renames and locks; give a folder on a file system "
                        "that all hosts mount: NFS, Lustre, Filestore (gcsfuse is for photographs only). Checkpoints "
                        "may lie in a bucket: --config.train.checkpoints=gs://bucket/folder")  # fmt: skip
    return Path(text)


def require_plain(workdir: Path) -> None:
    """Raises UserError for a folder whose path Orbax would take for a pattern: it deletes what it has just written."""
    found = sorted(set(str(workdir.absolute())) & set("[]*?"))
    if found:
        raise UserError(f"--workdir {workdir}: its path holds {' '.join(found)}, which checkpoints cannot be written "
                        "under; choose another folder")  # fmt: skip


def blocks_of(stage: str) -> str:
    """The UNet's blocks in which a stage's LoRA draws: `up` where photographs won, `all` before."""
    return "up" if stage in (CURRICULUM["hard"], NAIVE) else "all"


def train_command(stage: str, workdir: Path) -> str:
    """The command that trains a stage."""
    script = "stage0_sft" if stage == "stage0" else stage
    return f"python -m hgdpo_jax.main --config configs/{script}.py[:variant] --workdir {workdir}"


def was_started(workdir: Path, stage: str) -> bool:
    """Whether the training of a stage was started."""
    return (workdir / stage / "config.json").is_file()


def stage_config(workdir: Path, stage: str) -> ConfigDict:
    """The config that a stage was trained with. Raises UserError where it was not trained."""
    if not was_started(workdir, stage):
        raise UserError(f"{stage} was not trained in {workdir}; run first: {train_command(stage, workdir)}")
    return config_from_json(json.loads((workdir / stage / "config.json").read_text()))


def last_stage(workdir: Path) -> str:
    """The highest stage that was started. Raises UserError where there is none."""
    for stage in reversed(STAGES):
        if was_started(workdir, stage):
            return stage
    raise UserError(f"no stage was trained in {workdir}; run first: {train_command('stage1', workdir)}")
