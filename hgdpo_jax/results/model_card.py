"""The README.md of an exported model: where it comes from, code that draws with it, and what the folder holds."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hgdpo_jax import __version__
from hgdpo_jax import config as configuration
from hgdpo_jax.diffusion import recipe
from hgdpo_jax.diffusion.source import hub_repository
from hgdpo_jax.results import card_code
from hgdpo_jax.results.contents import (
    ADAPTER_FILE,
    CHECKPOINT_FILE,
    FOLDER,
    KOHYA_FILE,
    KOHYA_RECIPE_FILE,
    KOHYA_TEXT_FILE,
    PEFT_FILE,
    PEFT_NORMAL_FILE,
    PEFT_TEXT_FILE,
    RECIPE_FILE,
    Contents,
)
from hgdpo_jax.run.folder import GIVEN, PERSONALISE, TEXT_ENCODER

_BLOCKS = {"all": "in all blocks of the {}", "up": "in the {}'s up blocks only"}


def text(contents: Contents, about: Mapping[str, Any], files: Sequence[str]) -> str:
    """The card, with the front matter that the Hugging Face hub reads. Its code runs in the folder, from top to bottom.

    Args:
        contents: of the folder.
        about: what hgdpo.json says.
        files: what the folder holds.
    """
    base = contents.config.model.base
    paragraphs = [
        ["---", *_front(contents), "---"],
        [f"# {Path((hub_repository(base) or (base,))[0]).name}, {contents.stage} of HG-DPO"],
        [f"{_kind(contents)} (HG-DPO: Na, Kim, Lee, CVPR 2025) with hgdpo_jax {__version__}."],
        _facts(contents, about),
        *_drawing(contents, files),
        ["## Files"],
        [f"- `{file}`: {_FILES[file](contents)}" if file != FOLDER else f"- {FOLDER}" for file in files],
    ]
    return "\n\n".join("\n".join(lines) for lines in paragraphs) + "\n"


def merged(contents: Contents) -> str:
    """How the stage's LoRA is merged into the models, in words."""
    if contents.merge == "whole":
        return "merged whole: stronger than the recipe draws"
    where = "at all timesteps" if contents.stage == TEXT_ENCODER else _blocks(contents)
    return f"merged as the recipe draws with it: at weight {contents.weight:g}, {where}"


def _denoiser(contents: Contents) -> str:
    """The model that predicts, in words."""
    name = contents.pipeline.family.denoiser
    return {"unet": "UNet"}.get(name, name)


def _blocks(contents: Contents) -> str:
    """Where the recipe draws with the LoRA."""
    return _BLOCKS[contents.blocks].format(_denoiser(contents))


def _front(contents: Contents) -> list[str]:
    """Names the base only where that is on the hub."""
    repository, config = hub_repository(contents.config.model.base), contents.config
    tags = [contents.layout.tag, "text-to-image", "hg-dpo"]
    tags += ["dpo"] * (config.train.objective != "sft") + ["lora"] * config.train.params.endswith("lora")
    values: dict[str, Any] = {"base_model": repository[0]} if repository else {}
    values |= {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    values |= {"license": contents.pipeline.licence or "unknown", "tags": tags}
    return [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]


def _kind(contents: Contents) -> str:
    """What was done."""
    if contents.config.train.params == "adapter":
        return "An IP-Adapter for people, trained beside the frozen base model"
    if contents.config.train.objective == "sft":
        return "Supervised fine-tuning on photographs"
    return "Preference training" if contents.stage == GIVEN else "Preference training towards real photographs"


def _facts(contents: Contents, about: Mapping[str, Any]) -> list[str]:
    """Where it comes from, a line for each fact. Of files here the name alone: the rest concerns nobody else."""
    config, licence = contents.config, contents.pipeline.licence
    model, train = config.model, config.train
    known = f"`{licence}`" if licence else "not stated where the base was read from; it also binds this model"
    base = model.base if hub_repository(model.base) else Path(model.base).name
    more = f", VAE `{Path(model.vae).name}`" if model.vae else ""
    more += f", with the LoRA `{Path(model.lora).name}` merged" if model.lora else ""
    each = "preference pairs" if config.train.objective != "sft" else "photographs"
    steps = f"{contents.step}" + (f" of {train.steps}" if contents.step < train.steps else "")
    return [
        f"- Base model: `{base}`{more}; sha256 of its content `{about['base']}`",
        f"- Licence of the base model: {known}",
        f"- Stage: `{contents.stage}`, {steps} steps of {train.batch} {each}, learning rate {train.lr:g}",
        f"- Trained: {_trained(contents, contents.stage)}",
        f"- Resolution: {', '.join(config.data.resolutions)}, height x width in pixels",
        f"- Config: sha256 `{configuration.config_hash(config)}`",
        f"- Policy: sha256 `{about['policies'][contents.stage]}`",
        f"- Manifest of the {each}: sha256 `{about['pairs']}`",
    ]


def _trained(contents: Contents, stage: str) -> str:
    """Which parameters a stage trained."""
    config = contents.configs[stage]
    if config.train.params == "adapter":
        return f"an IP-Adapter of kind {config.adapter.kind}"
    if config.train.params == "all":
        return f"all parameters of the {_denoiser(contents)}"
    part = "text encoder" if stage == TEXT_ENCODER else _denoiser(contents)
    return f"LoRA of the {part}, rank {config.train.lora_rank}, alpha {config.train.lora_alpha:g}"


def _drawing(contents: Contents, files: Sequence[str]) -> list[list[str]]:
    """How to draw in diffusers, for each way that the folder knows."""
    ways: list[tuple[str, list[str]]] = []
    if FOLDER in files:
        ways.append((f"This folder is {_models(contents)}.", card_code.draw(contents, card_code.load_folder())))
    if CHECKPOINT_FILE in files:
        code = card_code.draw(contents, card_code.load_checkpoint(contents))
        ways.append((f"`{CHECKPOINT_FILE}` is {_models(contents)}.", code))
    if RECIPE_FILE in files:
        code = card_code.draw_with_recipe(contents)
        ways.append((f"`{RECIPE_FILE}` draws as HG-DPO does: {_recipe(files, contents)}.", code))
    elif PEFT_FILE in files:
        code = card_code.draw_with_lora(contents)
        ways.append((f"`{PEFT_FILE}` draws as HG-DPO does: {_recipe(files, contents)}.", code))
    solver = "DPM-Solver++ as the paper" if contents.drawing.scheduler else "the base model's own scheduler"
    found = [["## Drawing"], [f"Run the code in this folder. Each part draws by itself, with {solver}."]]
    for said, code in ways:
        found += [[said], [f"    {line}".rstrip() for line in code]]
    return found if ways else []


def _models(contents: Contents) -> str:
    """What the models are, in words."""
    params = contents.config.train.params
    if params == "adapter":
        said = "the base model as it was"
    elif params == "all":
        said = "the trained model"
    else:
        of = "the text encoder's LoRA" if contents.stage == TEXT_ENCODER else "the LoRA"
        said = f"the base model with {of} {merged(contents)}"
    early = TEXT_ENCODER in contents.configs and contents.stage != TEXT_ENCODER
    return said + (". The text encoder's LoRA is not in it: it acts at early timesteps only" if early else "")


def _recipe(files: Sequence[str], contents: Contents) -> str:
    """What the recipe does with the LoRA files."""
    unet = f"the {_denoiser(contents)}'s LoRA at weight {contents.weight:g}, {_blocks(contents)}"
    text = f"the text encoder's LoRA at weight {contents.weight:g} while the timestep is at least {recipe.TEXT_FROM}"
    return ", and ".join([unet] * (PEFT_FILE in files) + [text] * (PEFT_TEXT_FILE in files))


def _strength(contents: Contents) -> str:
    weight = f"{contents.weight:g}"
    return f"{weight} is the recipe" if contents.blocks == "all" else f"{weight} to 1, in all blocks"


def _adapter(contents: Contents) -> str:
    kind = contents.configs[PERSONALISE].adapter.kind
    call = f'pipeline.load_ip_adapter(".", "", "{ADAPTER_FILE}", image_encoder_folder=None)'
    return f"IP-Adapter for people, {kind}, for the encoder that it was trained with (ComfyUI; diffusers: `{call}`)"


def _checkpoint(contents: Contents) -> str:
    holds = "model" if contents.layout.is_whole else _denoiser(contents)
    return f"the {holds} as one file ({contents.layout.programs}, diffusers)"


def _lora(contents: Contents, programs: str) -> str:
    return f"the {_denoiser(contents)}'s LoRA, whole ({programs})"


# What each file is.
_FILES: dict[str, Callable[[Contents], str]] = {
    CHECKPOINT_FILE: _checkpoint,
    PEFT_FILE: lambda contents: _lora(contents, "diffusers, PEFT"),
    KOHYA_FILE: lambda contents: f"{_lora(contents, contents.layout.programs)}; strength {_strength(contents)}",
    KOHYA_RECIPE_FILE: lambda contents: "the UNet's LoRA as the recipe draws with it (ComfyUI, A1111); strength 1",
    PEFT_NORMAL_FILE: lambda contents: 'the normal stage\'s LoRA, for `load(pipeline, ".", blocks="up+normal")`',
    PEFT_TEXT_FILE: lambda contents: (
        f"{_trained(contents, TEXT_ENCODER)}; it restores the alignment with the prompt (diffusers, PEFT)"
    ),
    KOHYA_TEXT_FILE: lambda contents: (
        f"{_trained(contents, TEXT_ENCODER)}; it restores the alignment with the prompt "
        f"(ComfyUI, A1111); strength {contents.weight:g}"
    ),
    RECIPE_FILE: lambda contents: "draws with the LoRA files in diffusers (with peft)",
    ADAPTER_FILE: _adapter,
}
