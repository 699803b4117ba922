"""The code of a model card: it draws in diffusers with what an export holds, and runs in the export's folder."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from hgdpo_jax import config as configuration
from hgdpo_jax.diffusion import recipe
from hgdpo_jax.diffusion.source import hub_repository
from hgdpo_jax.models.weights import chosen
from hgdpo_jax.results.contents import CHECKPOINT_FILE, RECIPE_FILE, Contents, is_xl

PROMPT = "a portrait photograph of a woman"
_DIFFUSERS = ("AutoencoderKL", "DiffusionPipeline", "DPMSolverMultistepScheduler", "StableDiffusionPipeline",
              "StableDiffusionXLPipeline")  # fmt: skip
_RECIPE = ("draw", "load")
_DTYPE = {"dtype": "torch.float32"}  # else transformers takes that of config.json, whatever the weights have
_SCHEDULER = "pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config{})"
# What diffusers takes a single file for that has no config beside it.
_TAKEN_FOR = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}


def draw(contents: Contents, loaded: Sequence[str]) -> list[str]:
    """The lines that draw an `image`.

    Args:
        contents: of the export.
        loaded: lines that load a `pipeline`.
    """
    return _with_imports([*loaded, _SCHEDULER.format(""), _call("pipeline(", contents)])


def draw_with_recipe(contents: Contents) -> list[str]:
    """The lines that draw an `image` with the recipe's script: on ε_base, or on the models here if they were trained
    whole."""
    if contents.config.train.params != "all":
        loaded = load_base(contents)
    else:
        loaded = load_folder() if "diffusers" in contents.formats else load_checkpoint(contents)
    return _with_imports([*loaded, 'load(pipeline, ".")', _call("draw(pipeline, ", contents)])


def load_folder() -> list[str]:
    """The lines that load the diffusers folder."""
    return [f'pipeline = DiffusionPipeline.from_pretrained("."{_named(_DTYPE)})']


def load_checkpoint(contents: Contents) -> list[str]:
    """The lines that load the single file. Configs and scheduler come from the folder here or from that of the base."""
    more = {"config": _quoted(".")} if "diffusers" in contents.formats else _config(contents)
    return _load_file(contents, CHECKPOINT_FILE, more)


def load_base(contents: Contents) -> list[str]:
    """The lines that load ε_base: the checkpoint, with the VAE and the LoRA that the run gave it."""
    model = contents.config.model
    lines, more = [], {}
    if model.vae:
        how = "from_pretrained" if Path(model.vae).is_dir() else "from_single_file"
        config = _config(contents) if how == "from_single_file" else {}
        told = config | ({"subfolder": _quoted("vae")} if config else {})
        lines.append(f"vae = AutoencoderKL.{how}({_quoted(_absolute(model.vae))}{_named(told | _DTYPE)})")
        more["vae"] = "vae"
    if repository := hub_repository(model.base):
        name, more["revision"] = map(_quoted, repository)
        lines.append(f"pipeline = DiffusionPipeline.from_pretrained({name}{_named(more | _DTYPE)})")
    elif Path(model.base).is_dir():
        if ".fp16." in (chosen({path.name for path in Path(model.base, "unet").glob("*")}) or ""):
            more["variant"] = _quoted("fp16")
        path = _quoted(_absolute(model.base))
        lines.append(f"pipeline = DiffusionPipeline.from_pretrained({path}{_named(more | _DTYPE)})")
    else:
        lines += _load_file(contents, _absolute(model.base), more)
    if model.lora:
        folder, name = Path(model.lora).absolute().parent, Path(model.lora).name
        lines.append(f"pipeline.load_lora_weights({_quoted(str(folder))}, weight_name={_quoted(name)})")
        lines += ["pipeline.fuse_lora()", "pipeline.unload_lora_weights()"]
    return lines


def _config(contents: Contents) -> dict[str, str]:
    """Where `from_single_file` finds the configs of ε_base; it knows none where that is a single file too."""
    base = contents.config.model.base
    place = _absolute(base) if Path(base).is_dir() else (hub_repository(base) or ("",))[0]
    return {"config": _quoted(place)} if place else {}


def _load_file(contents: Contents, path: str, more: dict[str, str]) -> list[str]:
    kind = "StableDiffusionXLPipeline" if is_xl(contents.pipeline) else "StableDiffusionPipeline"
    lines = [f"pipeline = {kind}.from_single_file({_quoted(path)}{_named(more | _DTYPE)})"]
    config = contents.pipeline.schedule.config
    other = {key: config[key] for key, usual in _TAKEN_FOR.items() if config.get(key, usual) != usual}
    if other and "config" not in more:
        lines.append(_SCHEDULER.format(_named({key: repr(value) for key, value in other.items()})))
    return lines


def _call(begin: str, contents: Contents) -> str:
    height, width = next(iter(configuration.resolutions(contents.config).values()))
    guidance = contents.pipeline.family.guidance
    how = {"num_inference_steps": recipe.STEPS, "guidance_scale": guidance, "height": height, "width": width}
    return f"image = {begin}{_quoted(PROMPT)}{_named({key: str(value) for key, value in how.items()})}).images[0]"


def _with_imports(lines: Sequence[str]) -> list[str]:
    def used(names: Sequence[str]) -> str:
        return ", ".join(name for name in names if any(re.search(rf"\b{name}[.(]", line) for line in lines))

    imports = ["import torch", f"from diffusers import {used(_DIFFUSERS)}"]
    imports += [f"from {RECIPE_FILE.removesuffix('.py')} import {used(_RECIPE)}"] if used(_RECIPE) else []
    return [*imports, "", *lines]


def _named(arguments: dict[str, str]) -> str:
    return "".join(f", {name}={value}" for name, value in arguments.items())


def _absolute(path: str) -> str:
    return str(Path(path).absolute())


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
