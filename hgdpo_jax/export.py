"""A run's last stage → a diffusers folder (LoRA merged) and, where the policy is a LoRA, its PEFT file beside it.

python -m hgdpo_jax.export --workdir W --out DIR [--stage stage3]
"""

import argparse
import json
import os
import shutil
from pathlib import Path

from ml_collections import ConfigDict
from safetensors.numpy import save_file

from hgdpo_jax import command, runtime
from hgdpo_jax.data.pairs import write_json
from hgdpo_jax.diffusion import pipeline as pipelines
from hgdpo_jax.errors import UserError
from hgdpo_jax.models.convert import save_model
from hgdpo_jax.models.lora import merge_lora, to_peft
from hgdpo_jax.training import policy as policies
from hgdpo_jax.training.checkpoints import tree_hash

LORA_FILE = "pytorch_lora_weights.safetensors"


def export(workdir: Path, out: Path, stage: str | None = None) -> None:
    """Writes `out`, under a temporary name first.

    Raises:
        UserError: no finished stage, or `out` holds something else.
    """
    stage = stage or policies.last_stage(workdir)
    config = policies.stage_config(workdir, stage)
    pipeline = policies.load(config, runtime.local_mesh())
    trained = policies.finished(workdir, stage, policies.of(pipeline, config))
    policies.put(pipeline, trained)
    origin = {"stage": stage, "policy": tree_hash(trained), "base": str(config.model.base)}
    mark = out / "hgdpo.json"
    if mark.is_file() and json.loads(mark.read_text()) == origin:
        print(f"{out}: already holds {stage}")
        return
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: holds something else; choose another --out")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    _write(pipeline, config, partial)
    write_json(partial / "hgdpo.json", origin)
    if out.exists():
        out.rmdir()
    os.replace(partial, out)
    print(f"{out}: {stage} as a diffusers folder" + (f", {LORA_FILE} beside it" if (out / LORA_FILE).is_file() else ""))


def _write(pipeline: pipelines.Pipeline, config: ConfigDict, folder: Path) -> None:
    index = pipeline.folder / "model_index.json"
    if not index.is_file():
        raise UserError(f"{index}: no such file; a diffusers folder has one")
    folder.mkdir(parents=True)
    for part in ("tokenizer", "scheduler"):
        shutil.copytree(pipeline.folder / part, folder / part)
    shutil.copyfile(index, folder / index.name)
    if config.train.params == "lora":
        save_file(to_peft(pipeline.unet), folder / LORA_FILE, metadata={"format": "pt"})
        merge_lora(pipeline.unet)
    for part in ("unet", "vae", "text_encoder"):
        save_model(getattr(pipeline, part), folder / part)


def main() -> None:
    parser = argparse.ArgumentParser(description="Exports a run to diffusers.")
    parser.add_argument("--workdir", required=True, type=Path, help="folder of the run")
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--stage", help="stage to export; the last finished one unless given")
    arguments = parser.parse_args()
    export(arguments.workdir, arguments.out, arguments.stage)


if __name__ == "__main__":
    command.run(main)
