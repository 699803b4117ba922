"""The README.md of an exported model: where it comes from and how to load it."""

import json
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from hgdpo_jax import __version__
from hgdpo_jax import config as configuration
from hgdpo_jax.diffusion.pipeline import Pipeline

_ABOUT = {
    "a diffusers folder": (
        "    import torch",
        "    from diffusers import DiffusionPipeline",
        "",
        '    pipeline = DiffusionPipeline.from_pretrained("THIS_FOLDER", dtype=torch.float32)',
    ),
    "pytorch_lora_weights.safetensors": (
        "On the base model:",
        "",
        '    pipeline.load_lora_weights("THIS_FOLDER", weight_name="pytorch_lora_weights.safetensors")',
    ),
    "kohya_lora.safetensors": ("`kohya_lora.safetensors` is the LoRA for ComfyUI and A1111.",),
    "hgdpo_recipe.py": (
        "The paper draws otherwise: LoRA at weight 0.5, in the UNet's up blocks only, the text encoder's LoRA while",
        "the timestep is at least 900. `hgdpo_recipe.py` does that in diffusers, on the base model:",
        "",
        "    from hgdpo_recipe import draw, load",
        "",
        '    draw(load(pipeline, "THIS_FOLDER"), "a portrait photograph of a woman").images[0]',
    ),
    "text_encoder_lora.safetensors": (
        "`text_encoder_lora.safetensors` (and `kohya_text_encoder_lora.safetensors`) is the text encoder's LoRA. It",
        "restores the alignment with the prompt.",
    ),
    "ip_adapter.safetensors": (
        "`ip_adapter.safetensors` is an IP-Adapter for people, for the image encoder that it was trained with:",
        "",
        '    pipeline.load_ip_adapter("THIS_FOLDER", "", "ip_adapter.safetensors", image_encoder_folder=None)',
    ),
}


def text(pipeline: Pipeline, config: ConfigDict, *, policy: str, pairs: str, files: Sequence[str]) -> str:
    """The card, with the front matter that the Hugging Face hub reads.

    Args:
        pipeline: that was exported.
        config: the stage was trained with.
        policy: sha256 of the trained parameters.
        pairs: sha256 of the manifest of the stage's pair shards.
        files: what the folder holds.
    """
    licence = pipeline.licence or "unknown"
    known = f"`{licence}`" if pipeline.licence else "not stated where the base was read from; it also binds this model"
    front = {"base_model": config.model.base, "library_name": "diffusers", "pipeline_tag": "text-to-image"}
    front |= {"license": licence, "tags": ["stable-diffusion", "text-to-image", "hg-dpo", "dpo"]}
    name = Path(config.model.base).name
    return "\n".join(
        [
            "---",
            *(f"{key}: {json.dumps(value)}" for key, value in front.items()),
            "---",
            "",
            f"# {name}, {config.stage} of HG-DPO",
            "",
            f"Preference training towards real photographs (Na, Kim, Lee, CVPR 2025) with hgdpo_jax {__version__}.",
            "",
            f"- Base model: `{config.model.base}`"
            + (f", VAE `{config.model.vae}`" if config.model.vae else "")
            + (f", with the LoRA `{config.model.lora}` merged" if config.model.lora else ""),
            f"- Licence of the base model: {known}",
            f"- Stage: `{config.stage}`, {config.train.steps} steps of {config.train.batch} pairs",
            f"- Config: sha256 `{configuration.config_hash(config)}`",
            f"- Policy: sha256 `{policy}`",
            f"- Manifest of the preference pairs: sha256 `{pairs}`",
            f"- Here: {', '.join(files)}",
            *(line for file, lines in _ABOUT.items() if file in files for line in ("", *lines)),
            "",
        ]
    )
