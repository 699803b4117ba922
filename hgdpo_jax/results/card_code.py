"""The code of a model card: it draws in diffusers with what an export holds, and runs in the export's folder."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from hgdpo_jax import config as configuration
from hgdpo_jax.diffusion.source import hub_repository
from hgdpo_jax.models.merged import lora_file
from hgdpo_jax.models.weights import chosen
from hgdpo_jax.results.contents import CHECKPOINT_FILE, PEFT_FILE, RECIPE_FILE, Contents

PROMPT = "a portrait photograph of a woman"
_DIFFUSERS = ("AutoencoderKL", "AutoencoderKLFlux2", "DiffusionPipeline", "DPMSolverMultistepScheduler",
              "Flux2Transformer2DModel", "StableDiffusionPipeline", "StableDiffusionXLPipeline")  # fmt: skip
_RECIPE = ("draw", "load")
_DTYPE = {"dtype": "torch.float32"}  # else transformers takes that of config.json, whatever the weights have
_SCHEDULER = "pipeline.scheduler = {}.from_config(pipeline.scheduler.config{})"
# What diffusers takes a single file for that has no config beside it.
_TAKEN_FOR = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}


def draw(contents: Contents, loaded: Sequence[str]) -> list[str]:
    """The lines that draw an `image`.

    Args:
        contents: of the export.
        loaded: lines that load a `pipeline`.
    """
    scheduler = contents.drawing.scheduler
    lines = [_SCHEDULER.format(scheduler, "")] if scheduler else []
    return _with_imports([*loaded, *lines, _call("pipeline(prompt=", contents)])


def draw_with_lora(contents: Contents) -> list[str]:
    """The lines that draw an `image` on ε_base with the stage's LoRA, at the recipe's weight in all steps."""
    lora = [f'pipeline.load_lora_weights(".", weight_name={_quoted(PEFT_FILE)}, adapter_name="policy")']
    lora.append(f'pipeline.set_adapters("policy", {contents.weight:g})')
    return draw(contents, [*load_base(contents), *lora])


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
    """The lines that load the single file. Configs, scheduler and what it does not hold come from the folder here or
    from that of the base."""
    here = "diffusers" in contents.formats
    if contents.layout.is_whole:
        return _load_file(contents, CHECKPOINT_FILE, {"config": _quoted(".")} if here else _config(contents))
    lines, more = ([], {}) if here else _load_vae(contents)
    return lines + _load_denoiser(contents, CHECKPOINT_FILE, more, "." if here else _place(contents))


def load_base(contents: Contents) -> list[str]:
    """The lines that load ε_base: the checkpoint, with the VAE and the LoRA that the run gave it."""
    model = contents.config.model
    lines, more = _load_vae(contents)
    if hub_repository(model.base) or Path(model.base).is_dir():
        lines.append(_load_place(contents, _place(contents), more))
    elif contents.layout.is_whole:
        lines += _load_file(contents, _absolute(model.base), more)
    else:
        lines += _load_denoiser(contents, _absolute(model.base), more, _place(contents))
    if model.lora:
        file = lora_file(Path(model.lora)).absolute()
        folder, name = file.parent, file.name
        lines.append(f"pipeline.load_lora_weights({_quoted(str(folder))}, weight_name={_quoted(name)})")
        lines += ["pipeline.fuse_lora()", "pipeline.unload_lora_weights()"]
    return lines


def _load_vae(contents: Contents) -> tuple[list[str], dict[str, str]]:
    """The lines that load the VAE that the run gave ε_base, and the argument that hands it on; nothing without one."""
    vae = contents.config.model.vae
    if not vae:
        return [], {}
    how = "from_pretrained" if Path(vae).is_dir() else "from_single_file"
    config = _config(contents) if how == "from_single_file" else {}
    told = config | ({"subfolder": _quoted("vae")} if config else {})
    kind = contents.pipeline.family.models["vae"].__name__
    return [f"vae = {kind}.{how}({_quoted(_absolute(vae))}{_named(told | _DTYPE)})"], {"vae": "vae"}


def _place(contents: Contents) -> str:
    """The folder or repository of ε_base, also of a file that holds a part of it; empty where all is in one file."""
    base = contents.config.model.base
    if repository := hub_repository(base):
        return repository[0]
    if Path(base).is_dir():
        return _absolute(base)
    return "" if contents.layout.is_whole else str(Path(base).absolute().parent)


def _config(contents: Contents) -> dict[str, str]:
    """Where `from_single_file` finds the configs of ε_base; it knows none where that is a single file too."""
    place = _place(contents)
    return {"config": _quoted(place)} if place else {}


def _load_place(contents: Contents, place: str, more: dict[str, str]) -> str:
    """The line that loads the pipeline from a folder, or from a repository at the revision of ε_base.

    Args:
        contents: of the export.
        place: `.`, which is the export, or see :func:`_place`.
        more: further arguments.
    """
    repository, denoiser = hub_repository(contents.config.model.base), contents.pipeline.family.denoiser
    if repository and place == repository[0]:
        more = more | {"revision": _quoted(repository[1])}
    elif place != "." and ".fp16." in (chosen({path.name for path in Path(place, denoiser).glob("*")}) or ""):
        more = more | {"variant": _quoted("fp16")}
    return f"pipeline = DiffusionPipeline.from_pretrained({_quoted(place)}{_named(more | _DTYPE)})"


def _load_denoiser(contents: Contents, path: str, more: dict[str, str], place: str) -> list[str]:
    """The lines that load a file of the denoiser alone, its config from `place`, and the rest from there."""
    name = contents.pipeline.family.denoiser
    config = {"config": _quoted(place), "subfolder": _quoted(name)}
    line = f"{name} = {contents.layout.single_file}.from_single_file({_quoted(path)}{_named(config | _DTYPE)})"
    return [line, _load_place(contents, place, {name: name} | more)]


def _load_file(contents: Contents, path: str, more: dict[str, str]) -> list[str]:
    lines = [f"pipeline = {contents.layout.single_file}.from_single_file({_quoted(path)}{_named(more | _DTYPE)})"]
    config = contents.pipeline.schedule.config
    other = {key: config[key] for key, usual in _TAKEN_FOR.items() if config.get(key, usual) != usual}
    if other and "config" not in more:
        lines.append(
            _SCHEDULER.format(contents.drawing.scheduler, _named({key: repr(value) for key, value in other.items()}))
        )
    return lines


def _call(begin: str, contents: Contents) -> str:
    height, width = next(iter(configuration.resolutions(contents.config).values()))
    drawing, pipeline = contents.drawing, contents.pipeline
    how = {"num_inference_steps": drawing.steps, "guidance_scale": drawing.guidance, "height": height, "width": width}
    how |= pipeline.family.told(pipeline.tokenizers, pipeline.models)
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
