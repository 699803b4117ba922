"""What other programs load of a run: a diffusers folder or a single file (LoRA merged), LoRA files, the recipe."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from hgdpo_jax import __version__
from hgdpo_jax.devices.mesh import host_mesh
from hgdpo_jax.devices.xla import use_precision
from hgdpo_jax.diffusion import pipeline as pipelines
from hgdpo_jax.diffusion import recipe
from hgdpo_jax.diffusion.pipeline import text_of
from hgdpo_jax.diffusion.source import Source, open_source
from hgdpo_jax.models import ip_adapter, ldm
from hgdpo_jax.models.convert import save_model, to_torch
from hgdpo_jax.models.lora import merge_lora
from hgdpo_jax.models.text import Conditioner
from hgdpo_jax.models.weights import copy_model, write_weights
from hgdpo_jax.results import model_card
from hgdpo_jax.results.contents import (
    ABOUT_FILE,
    ADAPTER_FILE,
    CHECKPOINT_FILE,
    FOLDER,
    KOHYA_FILE,
    KOHYA_RECIPE_FILE,
    KOHYA_TEXT_FILE,
    PEFT_FILE,
    PEFT_NORMAL_FILE,
    PEFT_TEXT_FILE,
    RECIPE,
    RECIPE_FILE,
    Contents,
)
from hgdpo_jax.run import processes
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import filled, finish_filling, is_empty, write_json
from hgdpo_jax.run.folder import (
    CURRICULUM,
    PERSONALISE,
    TEXT_ENCODER,
    last_stage,
    stage_config,
    stage_folder,
    was_started,
)
from hgdpo_jax.run.locks import lock
from hgdpo_jax.training.checkpoints import tree_hash
from hgdpo_jax.training.finished import PAIRS, find_base, finished_policy, finished_step, made_from
from hgdpo_jax.training.policy import load_trainable, policy_of, set_policy

FORMATS = ("diffusers", "peft", "kohya", "ldm")
# Of the keys in files: transformers 4 gives a CLIPTextModel no weights without it, and 5 reads both.
_PREFIXES = {"text_encoder": "text_model."}
_OF_LORA, _OF_ALL = ("diffusers", "peft", "kohya"), ("diffusers", "ldm")  # unless asked for others


def export(
    workdir: Path,
    out: Path,
    stage: str | None = None,
    formats: Sequence[str] | None = None,
    base: str | None = None,
    merge: str | None = None,
    step: str | None = None,
) -> None:
    """Writes `out`, all of it or nothing. A fully fine-tuned policy has no LoRA files.

    Args:
        workdir: of the run.
        out: folder to write.
        stage: to export; the last that was started unless given.
        formats: some of FORMATS; unless given all but `ldm`, or of a fully fine-tuned policy `diffusers` and `ldm`.
        base: where the run's base model is, if it was moved; its weights are read where models are written.
        merge: how the LoRA is merged into the models: as the `recipe` draws with it, unless given, or `whole`.
        step: of the stage, see :func:`hgdpo_jax.training.finished.finished_policy`.

    Raises:
        UserError: no finished stage, an unknown format, nothing to merge, another base, or `out` holds something else.
    """
    stage = stage_folder(stage) if stage else last_stage(workdir)
    config = stage_config(workdir, stage)
    formats = _formats(stage, config.train.params, formats)
    merge = _merge(stage, config.train.params, formats, merge)
    beside = [name for name in (TEXT_ENCODER, PERSONALISE) if was_started(workdir, name)]
    configs = {name: stage_config(workdir, name) for name in beside}
    config.model.dtype = "float32"  # what is merged into is kept in full precision
    use_precision(config.model.dtype)
    # Files of LoRA need the names of its layers, not the base's weights, from which an adapter starts.
    weights = bool({*_OF_ALL} & {*formats}) or any(c.train.params == "adapter" for c in (config, *configs.values()))
    content = find_base(workdir, config, base, weights)
    others = [c for name, c in configs.items() if name != stage]
    source, normal = open_source(config.model.base, config.model.vae, config.model.lora), CURRICULUM["normal"]
    if config.train.params == "lora" and config.train.start == normal and source.family.drawing(source.index).scheduler:
        configs[normal] = config  # which the recipe's script reads
    configs.pop(stage, None)
    configs[stage] = config  # last: its policy is what the folder gets
    pipeline = load_trainable(config, host_mesh(), *others, weights=weights, text=_copied(source))
    policies = {
        name: finished_policy(workdir, name, policy_of(pipeline, c), c, step if name == stage else None)
        for name, c in configs.items()
    }
    contents = Contents(pipeline, stage, finished_step(workdir, stage, step), configs, policies, formats, merge)
    about = _about(contents, content, made_from(workdir, stage)[PAIRS])
    if not processes.is_first():  # which has read what process 0 now writes: reading is in step
        return
    with lock(out):
        finish_filling(out, ABOUT_FILE)
        if _holds(out, about):
            print(f"{out}: already holds {stage}")
            return
        if not is_empty(out):
            raise UserError(f"{out}: holds something else; choose another --out")
        with filled(out, ABOUT_FILE, about) as folder:
            written = write(contents, about, folder)
    print(f"{out}: {stage} as {', '.join(written)}")


def _copied(source: Source) -> Conditioner | None:
    """The text encoder, of shapes, where its files are copied as they are; None where it is read and written anew."""
    text = text_of(source, "float32")
    return text if any(getattr(model, "unused", None) for model in vars(text).values()) else None


def _formats(stage: str, params: str, given: Sequence[str] | None) -> Sequence[str]:
    """The formats that are written, in the order of FORMATS.

    Args:
        stage: that is exported.
        params: of it, `train.params`.
        given: by the user, if they were.

    Raises:
        UserError: an unknown one, or LoRA of a stage without.
    """
    for name in given or ():
        if name not in FORMATS:
            raise UserError(f"--format {name}: unknown; choose from {','.join(FORMATS)}")
    formats = given or (_OF_ALL if params == "all" else _OF_LORA)
    if params == "all" and not {*_OF_ALL} & {*formats}:
        raise UserError(f"--format {','.join(formats)}: {stage} trained all parameters and has no LoRA; add diffusers "
                        "or ldm")  # fmt: skip
    return [name for name in FORMATS if name in formats]


def _merge(stage: str, params: str, formats: Sequence[str], given: str | None) -> str | None:
    """How the LoRA is merged; None where none is. Raises UserError where the user asks for it then."""
    if params.endswith("lora") and {*_OF_ALL} & {*formats}:
        return given or "recipe"
    if given:
        why = f"{stage} trained no LoRA" if {*_OF_ALL} & {*formats} else "LoRA files are not merged"
        raise UserError(f"--merge {given}: {why}; leave it out")
    return None


def _about(contents: Contents, base: str, pairs: str) -> dict[str, Any]:
    """hgdpo.json: where an export comes from, and how `sample` draws with its LoRA.

    Args:
        contents: of the export.
        base: content hash of ε_base.
        pairs: hash of the manifest of the stage's pairs.
    """
    return {
        "version": __version__,
        "stage": contents.stage,
        "policies": {name: tree_hash(policy) for name, policy in contents.policies.items()},
        "base": base,
        "pairs": pairs,
        "formats": list(contents.formats),
        "merge": contents.merge,
        "blocks": contents.blocks,
        "weight": contents.weight,
    }


def _holds(out: Path, about: Mapping[str, Any]) -> bool:
    """Whether a folder holds this export, of whatever version."""
    try:
        found = json.loads((out / ABOUT_FILE).read_text())
    except (OSError, ValueError):  # no such file, or not ours
        return False
    return isinstance(found, dict) and found | {"version": about["version"]} == about


def write(contents: Contents, about: Mapping[str, Any], folder: Path) -> list[str]:
    """Writes policies, the recipe, models and model card into an empty folder; returns what it wrote.

    Args:
        contents: to write.
        about: what hgdpo.json says of them.
        folder: to write into.
    """
    written = _write_policies(contents, folder)
    if {PEFT_FILE, PEFT_TEXT_FILE} & {*written} and contents.drawing.scheduler:
        shutil.copyfile(RECIPE, folder / RECIPE_FILE)
        written.append(RECIPE_FILE)
    _put_policy(contents)
    if "diffusers" in contents.formats:
        _write_folder(contents.pipeline, folder)
        written.append(FOLDER)
    if "ldm" in contents.formats:
        merged = f", {model_card.merged(contents)}" if contents.merge else ""
        write_checkpoint(contents.pipeline, folder / CHECKPOINT_FILE, f"HG-DPO {contents.stage}{merged}")
        written.append(CHECKPOINT_FILE)
    (folder / "README.md").write_text(model_card.text(contents, about, written), encoding="utf-8")
    return written


def _write_policies(contents: Contents, folder: Path) -> list[str]:
    """Writes the files of LoRA and adapter; returns their names."""
    pipeline, stage, formats = contents.pipeline, contents.stage, contents.formats
    others = {"peft": PEFT_NORMAL_FILE} if contents.drawing.scheduler else {}  # which the script alone reads
    files = dict.fromkeys(contents.policies, others) | {
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
            models = _adapted(pipeline, name)
            for kind, file in files[name].items():
                if kind in formats:
                    _write_lora(folder / file, pipeline, pipeline.layout.lora_weights(models, kind), train)
                    written.append(file)
    if KOHYA_FILE in written and contents.blocks == "up":
        set_policy(pipeline, recipe.as_drawn(contents.policies[stage], "up", contents.weight))
        acting = _acting(pipeline.layout.lora_weights(_adapted(pipeline, stage), "kohya"))
        _write_lora(folder / KOHYA_RECIPE_FILE, pipeline, acting, contents.config.train)
        written.append(KOHYA_RECIPE_FILE)
    return written


def _put_policy(contents: Contents) -> None:
    """Puts the stage's policy into the models: all that was trained, or its LoRA merged."""
    policy = contents.policies[contents.stage]
    if contents.merge == "recipe":
        policy = recipe.as_drawn(policy, contents.blocks, contents.weight)
    set_policy(contents.pipeline, policy)
    if contents.merge:
        for model in _adapted(contents.pipeline, contents.stage).values():
            merge_lora(model)


def _adapted(pipeline: pipelines.Pipeline, stage: str) -> dict[str, Any]:
    """The models whose LoRA a stage trains."""
    names, is_denoiser = pipeline.layout.lora, stage != TEXT_ENCODER
    return {name: pipeline.models[name] for name in names if (name == pipeline.family.denoiser) == is_denoiser}


def _write_lora(path: Path, pipeline: pipelines.Pipeline, weights: Mapping[str, np.ndarray], train: ConfigDict) -> None:
    """A file of LoRA weights; of kohya's with the header that programs look for."""
    metadata = {
        "modelspec.architecture": f"{pipeline.layout.architecture}/lora",
        "ss_base_model_version": pipeline.layout.version,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(train.lora_rank),
        "ss_network_alpha": str(train.lora_alpha),
    }
    of_kohya = path.name in (KOHYA_FILE, KOHYA_TEXT_FILE, KOHYA_RECIPE_FILE)
    write_weights(path, weights, np.float32, metadata if of_kohya else {})


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
        if getattr(model, "unused", None):  # weights that its files have and it has not: they go on as they are
            assert pipeline.folder is not None  # no single file holds such a model
            copy_model(pipeline.folder / name, folder / name)
        else:
            save_model(model, folder / name, prefix=_PREFIXES.get(name, ""))


def write_checkpoint(pipeline: pipelines.Pipeline, path: Path, title: str) -> None:
    """A single file in the original layout, with the header that Stability AI's modelspec wants."""
    layout, v = pipeline.layout, pipeline.schedule.prediction_type == "v_prediction"
    models = {name: to_torch(pipeline.models[name]) for name in layout.parts}
    configs = {name: pipeline.models[name].config for name in layout.parts}
    tensors = ldm.to_single_file(models, configs, layout.parts)
    empty = np.zeros(0, np.float32)
    tensors |= {"v_pred": empty} if v else {}
    tensors |= {"ztsnr": empty} if pipeline.schedule.config.get("rescale_betas_zero_snr") else {}
    more = {"modelspec.license": pipeline.licence} if pipeline.licence else {}
    predicts = {"epsilon": "epsilon", "v_prediction": "v"}.get(pipeline.schedule.prediction_type)
    more |= {"modelspec.prediction_type": predicts} if predicts else {}  # it has no name for a flow's velocity
    metadata = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": layout.architecture,
        "modelspec.implementation": layout.implementation,
        "modelspec.title": title,
    }
    write_weights(path, tensors, np.float32, metadata | more)
