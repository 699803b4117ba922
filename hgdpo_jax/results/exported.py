"""What other programs load of a run: a diffusers folder or a single file (LoRA merged), LoRA files, the recipe."""

import json
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
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
from hgdpo_jax.run.folder import (
    CURRICULUM,
    PERSONALISE,
    TEXT_ENCODER,
    blocks_of,
    last_stage,
    stage_config,
    stage_folder,
    was_started,
)
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


class Contents(NamedTuple):
    """What is exported.

    Attributes:
        pipeline: with float32 parameters of all stages in `configs`.
        stage: whose policy the merged models get.
        configs, policies: of each stage that is written, `stage` last.
        formats: some of FORMATS.
    """

    pipeline: pipelines.Pipeline
    stage: str
    configs: Mapping[str, ConfigDict]
    policies: Mapping[str, Any]
    formats: Sequence[str]


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
    stage = stage_folder(stage) if stage else last_stage(workdir)
    config = stage_config(workdir, stage)
    formats = formats or (_OF_ALL if config.train.params == "all" else _OF_LORA)
    if config.train.params == "all" and not {*_OF_ALL} & {*formats}:
        raise UserError(f"--format {','.join(formats)}: {stage} trained all parameters and has no LoRA; add diffusers "
                        "or ldm")  # fmt: skip
    beside = [name for name in (TEXT_ENCODER, PERSONALISE) if was_started(workdir, name)]
    configs = {name: stage_config(workdir, name) for name in beside}
    normal = CURRICULUM["normal"]
    if config.train.params == "lora" and config.train.start == normal:
        configs[normal] = config
    configs.pop(stage, None)
    configs[stage] = config  # last: its policy is what the folder gets
    config.model.dtype = "float32"  # what is merged into is kept in full precision
    use_precision(config.model.dtype)
    content = find_base(workdir, config, base)
    pipeline = load_trainable(config, local_mesh(), *(configs[name] for name in beside if name != stage))
    policies = {name: finished_policy(workdir, name, policy_of(pipeline, c), c) for name, c in configs.items()}
    pairs = made_from(workdir, stage)[PAIRS]
    origin: dict[str, Any] = {
        "version": __version__,
        "stage": stage,
        "policies": {name: tree_hash(policy) for name, policy in policies.items()},
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
        written = _write(Contents(pipeline, stage, configs, policies, formats), partial)
        card = model_card.text(pipeline, config, policy=origin["policies"][stage], pairs=pairs, files=written)
        (partial / "README.md").write_text(card)
        write_json(partial / "hgdpo.json", origin)
    print(f"{out}: {stage} as {', '.join(written)}")


def _write(contents: Contents, folder: Path) -> list[str]:
    """Writes policies, models and the recipe into an empty folder; returns what it wrote."""
    pipeline, stage, formats = contents.pipeline, contents.stage, contents.formats
    files = {name: {"peft": PEFT_NORMAL_FILE} for name in contents.policies} | {
        stage: {"peft": PEFT_FILE, "kohya": KOHYA_FILE},
        TEXT_ENCODER: {"peft": PEFT_TEXT_FILE, "kohya": KOHYA_TEXT_FILE},
    }
    written = []
    for name, policy in contents.policies.items():
        set_policy(pipeline, policy)
        train = contents.configs[name].train
        if train.params == "adapter":
            assert pipeline.adapter is not None  # with the stage's policy in it
            ip_adapter.save(pipeline.adapter, folder / ADAPTER_FILE)
            written.append(ADAPTER_FILE)
        elif train.params != "all":
            part = "text" if name == TEXT_ENCODER else "unet"
            for kind, file in files[name].items():
                if kind in formats:
                    _write_lora(folder / file, pipeline, lora_weights(pipeline.models, kind, part), train)
                    written.append(file)
    if KOHYA_FILE in written and blocks_of(stage) == "up":
        set_policy(pipeline, recipe.as_drawn(contents.policies[stage], "up"))
        acting = _acting(lora_weights(pipeline.models, "kohya", "unet"))
        _write_lora(folder / KOHYA_RECIPE_FILE, pipeline, acting, contents.configs[stage].train)
        written.append(KOHYA_RECIPE_FILE)
        set_policy(pipeline, contents.policies[stage])
    if PEFT_FILE in written:
        shutil.copyfile(RECIPE, folder / RECIPE_FILE)
        written.append(RECIPE_FILE)
    for name, model in pipeline.models.items():
        if name == "unet" or stage == TEXT_ENCODER:
            merge_lora(model)
    if "diffusers" in formats:
        _write_folder(pipeline, folder)
        written.append("a diffusers folder")
    if "ldm" in formats:
        write_checkpoint(pipeline, folder / CHECKPOINT_FILE, f"HG-DPO {stage}")
        written.append(CHECKPOINT_FILE)
    return written


def _write_lora(path: Path, pipeline: pipelines.Pipeline, weights: Mapping[str, np.ndarray], train: ConfigDict) -> None:
    """A file of LoRA weights; of kohya's with the header that programs look for."""
    metadata = {
        "modelspec.architecture": f"{_architecture(pipeline)}/lora",
        "ss_base_model_version": "sdxl_base_v1-0" if _is_xl(pipeline) else "sd_v1",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(train.lora_rank),
        "ss_network_alpha": str(train.lora_alpha),
    }
    of_kohya = path.name in (KOHYA_FILE, KOHYA_TEXT_FILE, KOHYA_RECIPE_FILE)
    write_weights(path, weights, np.float32, metadata if of_kohya else {})


def lora_weights(models: Mapping[str, Any], kind: str, part: str) -> dict[str, np.ndarray]:
    """The LoRA of a pipeline's models in one dictionary, keyed as the loaders of a format expect it.

    Args:
        models: `unet`, `text_encoder`, and XL's `text_encoder_2`.
        kind: peft or kohya.
        part: `unet`, or `text` for all text encoders.
    """
    unet, xl = models["unet"], "text_encoder_2" in models
    if part == "unet":
        if kind == "peft":
            return to_peft(unet, "unet")
        # kohya's scripts train SD 1.5 under diffusers' names and XL under those of the original code.
        return (
            to_kohya(unet, "lora_unet", partial(unet_name, config=unet.config)) if xl else to_kohya(unet, "lora_unet")
        )
    found: dict[str, np.ndarray] = {}
    for number, name in enumerate(("text_encoder", "text_encoder_2")[: 1 + xl], start=1):
        inside = "" if name == "text_encoder_2" else "text_model."
        if kind == "peft":
            found |= to_peft(models[name], f"{name}.{inside}".rstrip("."))
        else:
            found |= to_kohya(models[name], f"lora_te{number}" if xl else "lora_te", inside.__add__)
    return found


def _is_xl(pipeline: pipelines.Pipeline) -> bool:
    return "text_encoder_2" in pipeline.models


def _architecture(pipeline: pipelines.Pipeline) -> str:
    return f"stable-diffusion-{'xl-v1-base' if _is_xl(pipeline) else 'v1'}"


def _acting(kohya: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """kohya's weights without the layers whose LoRA does nothing."""
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
    xl, v = _is_xl(pipeline), pipeline.schedule.prediction_type == "v_prediction"
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
