"""How other programs know each kind of checkpoint: its names in single files and in LoRA files, headers, classes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from hgdpo_jax.models.flux2_original import module, transformer_part
from hgdpo_jax.models.ldm import SD1_PARTS, SDXL_PARTS, Translate, bare, clip_part, unet_part
from hgdpo_jax.models.lora import to_kohya, to_peft


class LoRANames(NamedTuple):
    """What the keys of a model's LoRA begin with, and where kohya's scripts have its modules."""

    peft: str
    kohya: str
    module: Translate


@dataclass(frozen=True)
class Layout:
    """How other programs know a kind of checkpoint.

    Attributes:
        architecture, implementation: for the header of Stability AI's modelspec.
        version: what kohya's scripts call the base.
        tag: on the hub.
        programs: that read kohya's LoRA files and single files, beside diffusers.
        single_file: diffusers' class whose `from_single_file` reads those.
        parts: model → where a single file keeps it; what is not in it has to come from a folder.
        lora: model → the names of its LoRA; of no other model do programs read one.
    """

    architecture: str
    implementation: str
    version: str
    tag: str
    programs: str
    single_file: str
    parts: Mapping[str, tuple[str, Translate]]
    lora: Mapping[str, LoRANames]

    @property
    def is_whole(self) -> bool:
        """Whether a single file holds all models."""
        return "vae" in self.parts

    def lora_weights(self, models: Mapping[str, Any], kind: str) -> dict[str, np.ndarray]:
        """The LoRA of some models in one dictionary, keyed as the loaders of a format expect it.

        Args:
            models: by their folders.
            kind: peft or kohya.
        """
        found: dict[str, np.ndarray] = {}
        for name, names in self.lora.items():
            if name in models:
                model = models[name]
                of_kind = to_peft(model, names.peft) if kind == "peft" else to_kohya(model, names.kohya, names.module)
                found |= of_kind
        return found


_STABILITY = "https://github.com/Stability-AI/generative-models"
SD1 = Layout(
    architecture="stable-diffusion-v1",
    implementation=_STABILITY,
    version="sd_v1",
    tag="stable-diffusion",
    programs="ComfyUI, A1111",
    single_file="StableDiffusionPipeline",
    parts=SD1_PARTS,
    lora={
        "unet": LoRANames("unet", "lora_unet", bare),
        "text_encoder": LoRANames("text_encoder.text_model", "lora_te", clip_part),
    },
)
# kohya's scripts train SD 1.5 under diffusers' names and XL under those of the original code.
SDXL = Layout(
    architecture="stable-diffusion-xl-v1-base",
    implementation=_STABILITY,
    version="sdxl_base_v1-0",
    tag="stable-diffusion-xl",
    programs="ComfyUI, A1111",
    single_file="StableDiffusionXLPipeline",
    parts=SDXL_PARTS,
    lora={
        "unet": LoRANames("unet", "lora_unet", unet_part),
        "text_encoder": LoRANames("text_encoder.text_model", "lora_te1", clip_part),
        "text_encoder_2": LoRANames("text_encoder_2", "lora_te2", bare),
    },
)
_KLEIN_SIZES = {(5, 20, 24): "-4b", (8, 24, 32): "-9b"}  # by double blocks, single blocks and heads


def klein(config: Mapping[str, Any]) -> Layout:
    """Of FLUX.2-klein, whose names tell its size where it is one of the published.

    Args:
        config: of the transformer.
    """
    counts = (config.get(key, 0) for key in ("num_layers", "num_single_layers", "num_attention_heads"))
    size = _KLEIN_SIZES.get(tuple(counts), "")
    return Layout(
        architecture=f"Flux.2-klein{size}",
        implementation="https://github.com/black-forest-labs/flux2",
        version=f"flux_2_klein{size.replace('-', '_')}",
        tag="flux2-klein",
        programs="ComfyUI, musubi-tuner",
        single_file="Flux2Transformer2DModel",
        parts={"transformer": ("", transformer_part)},
        lora={"transformer": LoRANames("transformer", "lora_unet", module)},
    )
