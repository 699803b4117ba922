"""What a run folder is: where it can lie, its stages by name, their configs, and the commands that make them."""

import re
from pathlib import Path

from ml_collections import ConfigDict

from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.settings import CONFIGS, CURRICULUM, read_config

BASE_STAGE = "base"  # what `--stage` calls ε_base
SFT, GIVEN = "stage0", "given"  # fine-tuning; one stage of pairs that exist already
# Stages beside the curriculum; `naive` is what it is compared with.
TEXT_ENCODER, PERSONALISE, NAIVE = "text_encoder", "personalise", "naive"
STAGES = (
    PERSONALISE,
    TEXT_ENCODER,
    SFT,
    GIVEN,
    NAIVE,
    *CURRICULUM.values(),
)  # the last one that is there is drawn with
BLOCKS = ("all", "up", "up+normal")  # of the UNet, in which a stage's LoRA can draw


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


def step_name(text: str) -> str:
    """A checkpoint of a stage as a command line names it: a step, `latest`, or `best` by held-out loss.

    Raises:
        UserError: it is none of these.
    """
    if text not in ("latest", "best") and not re.fullmatch(r"[1-9][0-9]*", text):
        raise UserError(f"--step {text}: expects a number of a kept checkpoint, latest or best")
    return text


def require_plain(workdir: Path) -> None:
    """Raises UserError for a folder whose path Orbax would take for a pattern: it deletes what it has just written."""
    found = sorted(set(str(workdir.absolute())) & set("[]*?"))
    if found:
        raise UserError(f"--workdir {workdir}: its path holds {' '.join(found)}, which checkpoints cannot be written "
                        "under; choose another folder")  # fmt: skip


def blocks_of(config: ConfigDict, blocks: str) -> str:
    """The UNet's blocks in which a stage's LoRA draws, `all` or `up`.

    Args:
        config: of the stage.
        blocks: `recipe.blocks`. As the paper: `up` for the hard stage and the naive run, and what learnt from their
            pairs (of several stages, the last of them), `all` before.
    """
    if blocks != "paper":
        return blocks
    return "up" if pair_stages(config)[-1] in (CURRICULUM["hard"], NAIVE) else "all"


def pair_stages(config: ConfigDict) -> list[str]:
    """The stages whose pairs a stage learns from: itself unless `train.pairs` names others."""
    return [name.strip() for name in config.train.pairs.split(",")] if config.train.pairs else [config.stage]


def stage_folder(name: str) -> str:
    """The folder of a stage that a command line names, by that folder or as the paper does: easy, normal, hard."""
    return CURRICULUM.get(name, name)


def stage_command(command: str, stage: str, workdir: Path) -> str:
    """The command, `pairs` or `main`, for a stage."""
    script = "stage0_sft" if stage == SFT else stage
    for file in (f"{script}.py", f"ablations/{script}.py", f"baselines/{script}.py"):
        if (CONFIGS / file).is_file():
            return f"python -m hgdpo_jax.{command} --config configs/{file}[:variant] --workdir {workdir}"
    return f"python -m hgdpo_jax.{command} --config FILE --workdir {workdir}, where FILE is the config of {stage}"


def train_command(stage: str, workdir: Path) -> str:
    """The command that trains a stage."""
    return stage_command("main", stage, workdir)


def was_started(workdir: Path, stage: str) -> bool:
    """Whether the training of a stage was started."""
    return (workdir / stage / "config.json").is_file()


def stage_config(workdir: Path, stage: str) -> ConfigDict:
    """The config that a stage was trained with. Raises UserError where it was not trained."""
    if stage == BASE_STAGE:
        raise UserError("base: is the model that the run began with, nothing was trained; choose a stage")
    if not was_started(workdir, stage):
        there = ", ".join(sorted(path.parent.name for path in workdir.glob("*/config.json")))
        raise UserError(f"{stage} was not trained in {workdir}{f', {there} was' if there else ''}; run first: "
                        f"{train_command(stage, workdir)}")  # fmt: skip
    return read_config(workdir / stage / "config.json")


def last_stage(workdir: Path) -> str:
    """The highest stage that was started; one of another name where there is no other. Raises UserError where there is
    none."""
    for stage in reversed(STAGES):
        if was_started(workdir, stage):
            return stage
    for config in sorted(workdir.glob("*/config.json")):
        return config.parent.name
    raise UserError(f"no stage was trained in {workdir}; run first: {train_command('stage1', workdir)}")
