"""A run's last stage → what other programs load: a diffusers folder (LoRA merged), its LoRA in two forms.

python -m hgdpo_jax.export --workdir W --out DIR [--stage stage3] [--format diffusers,peft,kohya]
"""

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from flax import nnx
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from hgdpo_jax import command, model_card, runtime
from hgdpo_jax.data.pairs import file_hash, write_json
from hgdpo_jax.diffusion import pipeline as pipelines
from hgdpo_jax.errors import UserError
from hgdpo_jax.models.convert import save_model
from hgdpo_jax.models.ldm import unet_name
from hgdpo_jax.models.lora import merge_lora, to_kohya, to_peft
from hgdpo_jax.training import policy as policies
from hgdpo_jax.training.checkpoints import tree_hash

FORMATS = ("diffusers", "peft", "kohya")
PEFT_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "kohya_lora.safetensors"


def export(workdir: Path, out: Path, stage: str | None = None, formats: Sequence[str] = FORMATS) -> None:
    """Writes `out`, under a temporary name first. A fully fine-tuned policy has no LoRA files.

    Raises:
        UserError: no finished stage, an unknown format, or `out` holds something else.
    """
    for name in formats:
        if name not in FORMATS:
            raise UserError(f"--format {name}: unknown; choose from {','.join(FORMATS)}")
    stage = stage or policies.last_stage(workdir)
    config = policies.stage_config(workdir, stage)
    lora = config.train.params == "lora"
    if not lora and "diffusers" not in formats:
        raise UserError(f"--format {','.join(formats)}: {stage} trained all parameters and has no LoRA; add diffusers")
    config.model.dtype = "float32"  # what is merged into is kept in full precision
    pipeline = policies.load(config, runtime.local_mesh())
    trained = policies.finished(workdir, stage, policies.of(pipeline, config))
    policies.put(pipeline, trained)
    origin = {
        "stage": stage,
        "policy": tree_hash(trained),
        "base": str(config.model.base),
        "formats": [name for name in FORMATS if name in formats],
    }
    mark = out / "hgdpo.json"
    if mark.is_file() and json.loads(mark.read_text()) == origin:
        print(f"{out}: already holds {stage}")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: holds something else; choose another --out")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    written = []
    if lora:
        written += _write_lora(pipeline, config, partial, formats)
        merge_lora(pipeline.unet)
    if "diffusers" in formats:
        _write_folder(pipeline, partial)
        written.append("a diffusers folder")
    manifest = workdir / stage / "pairs" / "manifest.json"
    card = model_card.text(pipeline, config, policy=origin["policy"], pairs=file_hash(manifest), files=written)
    (partial / "README.md").write_text(card)
    write_json(partial / "hgdpo.json", origin)
    if out.exists():
        out.rmdir()
    os.replace(partial, out)
    print(f"{out}: {stage} as {', '.join(written)}")


def lora_weights(models: dict[str, nnx.Module], kind: str) -> dict:
    """The LoRA of a pipeline's models in one dictionary, keyed as the loaders of a format expect it.

    Args:
        models: `unet`, `text_encoder`, and XL's `text_encoder_2`; those without LoRA add nothing.
        kind: peft or kohya.
    """
    unet, xl = models["unet"], "text_encoder_2" in models
    if kind == "peft":
        found = to_peft(unet, "unet")
        for name, model in models.items():
            if name != "unet":
                found |= to_peft(model, name if name == "text_encoder_2" else f"{name}.text_model")
        return found
    # kohya's scripts train SD 1.5 under diffusers' names and XL under those of the original code.
    found = to_kohya(unet, "lora_unet", (lambda name: unet_name(name, unet.config)) if xl else lambda name: name)
    found |= to_kohya(models["text_encoder"], "lora_te1" if xl else "lora_te", lambda name: f"text_model.{name}")
    return found | (to_kohya(models["text_encoder_2"], "lora_te2") if xl else {})


def _write_lora(pipeline: pipelines.Pipeline, config: ConfigDict, folder: Path, formats: Sequence[str]) -> list[str]:
    metadata = {"format": "pt"}
    written = []
    if "peft" in formats:
        save_file(lora_weights(pipeline.models, "peft"), folder / PEFT_FILE, metadata)
        written.append(PEFT_FILE)
    if "kohya" in formats:
        xl = "text_encoder_2" in pipeline.models
        metadata |= {
            "modelspec.architecture": f"stable-diffusion-{'xl-v1-base' if xl else 'v1'}/lora",
            "ss_base_model_version": "sdxl_base_v1-0" if xl else "sd_v1",
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(config.train.lora_rank),
            "ss_network_alpha": str(config.train.lora_alpha),
        }
        save_file(lora_weights(pipeline.models, "kohya"), folder / KOHYA_FILE, metadata)
        written.append(KOHYA_FILE)
    return written


def _write_folder(pipeline: pipelines.Pipeline, folder: Path) -> None:
    write_json(folder / "model_index.json", pipeline.index)
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", pipeline.scheduler)
    for name, tokenizer in pipeline.tokenizers.items():
        tokenizer.save_pretrained(folder / name)
    for name, model in pipeline.models.items():
        save_model(model, folder / name)


def main() -> None:
    parser = argparse.ArgumentParser(description="Exports a run to diffusers, PEFT and kohya.")
    parser.add_argument("--workdir", required=True, type=Path, help="folder of the run")
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--stage", help="stage to export; the last finished one unless given")
    parser.add_argument("--format", default=",".join(FORMATS), help="some of %(default)s, with commas between")
    arguments = parser.parse_args()
    export(arguments.workdir, arguments.out, arguments.stage, arguments.format.split(","))


if __name__ == "__main__":
    command.run(main)
