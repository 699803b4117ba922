"""What other programs load of a run: a diffusers folder or a single file (LoRA merged), LoRA files, the recipe."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from hgdpo_jax import __version__
from hgdpo_jax import config as configuration
from hgdpo_jax.devices.mesh import local_mesh
from hgdpo_jax.devices.xla import use_precision
from hgdpo_jax.diffusion import pipeline as pipelines
from hgdpo_jax.diffusion import recipe
from hgdpo_jax.models import ip_adapter, ldm
from hgdpo_jax.models.convert import save_model, to_torch
from hgdpo_jax.models.ldm import unet_name
from hgdpo_jax.models.lora import merge_lora, to_kohya, to_peft
from hgdpo_jax.models.weights import write_weights
from hgdpo_jax.results import model_card
from hgdpo_jax.run import processes
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import atomic_path, write_json
from hgdpo_jax.run.folder import CURRICULUM, PERSONALISE, TEXT_ENCODER, blocks_of, last_stage, stage_config
from hgdpo_jax.run.locks import lock
from hgdpo_jax.training.checkpoints import tree_hash
from hgdpo_jax.training.finished import PAIRS, find_base, finished_policy, made_from
from hgdpo_jax.training.policy import load_trainable, policy_of, set_policy

FORMATS = ("diffusers", "peft", "kohya", "ldm")
_OF_LORA, _OF_ALL = ("diffusers", "peft", "kohya"), ("diffusers", "ldm")  # unless asked for others
PEFT_FILE, KOHYA_FILE = "pytorch_lora_weights.safetensors", "kohya_lora.safetensors"
# The text encoders' LoRA, and for the recipe that of the stage before the hard one.
PEFT_TEXT_FILE, KOHYA_TEXT_FILE = "text_encoder_lora.safetensors", "kohya_text_encoder_lora.safetensors"
PEFT_NORMAL_FILE = "normal_lora.safetensors"
# The hard stage's LoRA as the recipe draws with it, for programs that know one strength for all blocks.
KOHYA_RECIPE_FILE = "kohya_recipe_lora.safetensors"
CHECKPOINT_FILE = "checkpoint.safetensors"
ADAPTER_FILE = "ip_adapter.safetensors"
RECIPE, RECIPE_FILE = configuration.ASSETS / "diffusers_recipe.py", "hgdpo_recipe.py"


def export(
    workdir: Path, out: Path, stage: str | None = None, formats: Sequence[str] | None = None, base: str | None = None
) -> None:
    """Writes `out`, all of it or nothing. A fully fine-tuned policy has no LoRA files.

    Args:
        workdir: of the run.
        out: folder to write.
        stage: to export; the last that was started unless given.
        formats: some of FORMATS; unless given all but `ldm`, or of a fully fine-tuned policy `diffusers` and `ldm`.
        base: where the run's base model is, if it was moved.

    Raises:
        UserError: no finished stage, an unknown format, another base, or `out` holds something else.
    """
    for name in formats or ():
        if name not in FORMATS:
            raise UserError(f"--format {name}: unknown; choose from {','.join(FORMATS)}")
    stage = stage or last_stage(workdir)
    config, text = stage_config(workdir, stage), TEXT_ENCODER
    formats = formats or (_OF_ALL if config.train.params == "all" else _OF_LORA)
    configs = {stage: config}  # of what is written; the stage's own last: its policy is what the folder gets
    normal = CURRICULUM["normal"]
    if config.train.params == "lora" and config.train.start == normal:
        configs = {normal: config} | configs
    beside = [name for name in (text, PERSONALISE) if (workdir / name / "config.json").is_file()]
    configs = {name: stage_config(workdir, name) for name in beside} | configs
    if config.train.params == "all" and not {*_OF_ALL} & {*formats}:
        raise UserError(f"--format {','.join(formats)}: {stage} trained all parameters and has no LoRA; add diffusers "
                        "or ldm")  # fmt: skip
    config.model.dtype = "float32"  # what is merged into is kept in full precision
    use_precision(config.model.dtype)
    content = find_base(workdir, config, base)
    pipeline = load_trainable(config, local_mesh(), *(configs[name] for name in beside if name != stage))
    trained = {name: finished_policy(workdir, name, policy_of(pipeline, c), c) for name, c in configs.items()}
    pairs = made_from(workdir, stage)[PAIRS]
    origin = {
        "version": __version__,
        "stage": stage,
        "policies": {name: tree_hash(policy) for name, policy in trained.items()},
        "base": content,
        "formats": [name for name in FORMATS if name in formats],
    }
    if not processes.is_first():  # which has read what process 0 now writes: reading is in step
        return
    mark = out / "hgdpo.json"
    if mark.is_file() and json.loads(mark.read_text()) | {"version": __version__} == origin:
        print(f"{out}: already holds {stage}")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: holds something else; choose another --out")
    with lock(out), atomic_path(out) as partial:
        partial.mkdir()
        written = _write(pipeline, partial, stage, configs, trained, formats, origin, pairs)
    print(f"{out}: {stage} as {', '.join(written)}")


def _write(
    pipeline: pipelines.Pipeline,
    folder: Path,
    stage: str,
    configs: Mapping[str, ConfigDict],
    trained: Mapping[str, Any],
    formats: Sequence[str],
    origin: Mapping[str, Any],
    pairs: str,
) -> list[str]:
    """Writes policies, model, recipe, card and origin into an empty folder; returns what it wrote.

    Args:
        pipeline: with the parameters of all stages in `configs`, float32.
        folder: to write into.
        stage, formats: see :func:`export`.
        configs, trained: of each stage that is written, the exported one last.
        origin: what hgdpo.json says.
        pairs: hash of those that the stage learnt from.
    """
    config, text, written = configs[stage], TEXT_ENCODER, []
    lora_files = {name: {"peft": PEFT_NORMAL_FILE} for name in trained} | {
        stage: {"peft": PEFT_FILE, "kohya": KOHYA_FILE},
        text: {"peft": PEFT_TEXT_FILE, "kohya": KOHYA_TEXT_FILE},
    }
    for name, policy in trained.items():
        set_policy(pipeline, policy)
        if configs[name].train.params == "adapter":
            ip_adapter.save(pipeline.adapter, folder / ADAPTER_FILE)
            written.append(ADAPTER_FILE)
        elif configs[name].train.params != "all":
            part, train = ("text" if name == text else "unet"), configs[name].train
            for kind, file in lora_files[name].items():
                if kind in formats:
                    metadata = _metadata(pipeline, kind, train.lora_rank, train.lora_alpha)
                    write_weights(folder / file, lora_weights(pipeline.models, kind, part), np.float32, metadata)
                    written.append(file)
    if KOHYA_FILE in written and blocks_of(stage) == "up":
        set_policy(pipeline, recipe.as_drawn(trained[stage], "up"))
        metadata = _metadata(pipeline, "kohya", config.train.lora_rank, config.train.lora_alpha)
        acting = _acting(lora_weights(pipeline.models, "kohya", "unet"))
        write_weights(folder / KOHYA_RECIPE_FILE, acting, np.float32, metadata)
        written.append(KOHYA_RECIPE_FILE)
        set_policy(pipeline, trained[stage])
    if PEFT_FILE in written:
        shutil.copyfile(RECIPE, folder / RECIPE_FILE)
        written.append(RECIPE_FILE)
    for name, model in pipeline.models.items():
        if name == "unet" or stage == text:
            merge_lora(model)
    if "diffusers" in formats:
        _write_folder(pipeline, folder)
        written.append("a diffusers folder")
    if "ldm" in formats:
        write_checkpoint(pipeline, folder / CHECKPOINT_FILE, f"HG-DPO {stage}")
        written.append(CHECKPOINT_FILE)
    card = model_card.text(pipeline, config, policy=origin["policies"][stage], pairs=pairs, files=written)
    (folder / "README.md").write_text(card)
    write_json(folder / "hgdpo.json", origin)
    return written


def lora_weights(models: Mapping[str, nnx.Module], kind: str, part: str) -> dict[str, np.ndarray]:
    """The LoRA of a pipeline's models in one dictionary, keyed as the loaders of a format expect it.

    Args:
        models: `unet`, `text_encoder`, and XL's `text_encoder_2`.
        kind: peft or kohya.
        part: `unet`, or `text` for all text encoders.
    """
    unet, xl, found = models["unet"], "text_encoder_2" in models, {}
    if part == "unet":
        # kohya's scripts train SD 1.5 under diffusers' names and XL under those of the original code.
        rename = (lambda name: unet_name(name, unet.config)) if xl else lambda name: name
        return to_peft(unet, "unet") if kind == "peft" else to_kohya(unet, "lora_unet", rename)
    for number, name in enumerate(("text_encoder", "text_encoder_2")[: 1 + xl], start=1):
        inside = "" if name == "text_encoder_2" else "text_model."
        if kind == "peft":
            found |= to_peft(models[name], f"{name}.{inside}".rstrip("."))
        else:
            prefix = f"lora_te{number}" if xl else "lora_te"
            found |= to_kohya(models[name], prefix, lambda path, inside=inside: inside + path)
    return found


def _metadata(pipeline: pipelines.Pipeline, kind: str, rank: int, alpha: float) -> dict[str, str]:
    """What programs that read kohya's files look for in their header."""
    if kind == "peft":
        return {}
    xl = "text_encoder_2" in pipeline.models
    return {
        "modelspec.architecture": f"{_architecture(pipeline)}/lora",
        "ss_base_model_version": "sdxl_base_v1-0" if xl else "sd_v1",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(alpha),
    }


def _architecture(pipeline: pipelines.Pipeline) -> str:
    return f"stable-diffusion-{'xl-v1-base' if 'text_encoder_2' in pipeline.models else 'v1'}"


def _acting(kohya: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without the layers whose LoRA does nothing."""
    return {key: value for key, value in kohya.items() if kohya[f"{key.partition('.')[0]}.lora_up.weight"].any()}


def _write_folder(pipeline: pipelines.Pipeline, folder: Path) -> None:
    written = {*pipeline.models, *pipeline.tokenizers, "scheduler"}
    index = dict(pipeline.index)
    for name, kind in index.items():
        if isinstance(kind, list | tuple) and name not in written:  # such as SD 1.5's safety checker
            index[name] = [None, None]
    if "requires_safety_checker" in index or "safety_checker" in index:
        index["requires_safety_checker"] = False
    write_json(folder / "model_index.json", index)
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", pipeline.schedule.config)
    for name, tokenizer in pipeline.tokenizers.items():
        tokenizer.save_pretrained(folder / name)
        tokenizer.backend_tokenizer.model.save(str(folder / name))  # as vocab.json and merges.txt too
    for name, model in pipeline.models.items():
        save_model(model, folder / name)


def write_checkpoint(pipeline: pipelines.Pipeline, path: Path, title: str) -> None:
    """A single file in LDM's layout, with the header that Stability AI's modelspec wants."""
    xl, v = "text_encoder_2" in pipeline.models, pipeline.schedule.prediction_type == "v_prediction"
    models = {name: to_torch(model) for name, model in pipeline.models.items()}
    configs = {name: model.config for name, model in pipeline.models.items()}
    tensors = ldm.to_single_file(models, configs, ldm.SDXL_PARTS if xl else ldm.SD1_PARTS)
    empty = np.zeros(0, np.float32)
    tensors |= {"v_pred": empty} if v else {}
    tensors |= {"ztsnr": empty} if pipeline.schedule.config.get("rescale_betas_zero_snr") else {}
    licence = {"modelspec.license": pipeline.licence} if pipeline.licence else {}
    metadata = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": _architecture(pipeline),
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title,
        "modelspec.prediction_type": "v" if v else "epsilon",
    }
    write_weights(path, tensors, np.float32, metadata | licence)
