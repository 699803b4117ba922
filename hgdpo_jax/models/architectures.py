"""The configs of Stable Diffusion 1.5 and XL, which single files leave out, and which of the two a file holds; those of
FLUX.2-klein-base-4B, for plans."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hgdpo_jax.models.flux2_original import MARK, PREFIXES, SCALE, saved_part, transformer_part
from hgdpo_jax.models.ldm import SD1_PARTS, SDXL_PARTS, Translate, bare
from hgdpo_jax.models.weights import Weights
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import PACKAGE


@dataclass(frozen=True)
class Architecture:
    """Configs by part, as in a diffusers folder, and where a single file keeps each part."""

    name: str
    configs: Mapping[str, Mapping[str, Any]]
    scheduler: Mapping[str, Any]
    index: Mapping[str, Any]
    parts: Mapping[str, tuple[str, Translate]]


def _architecture(name: str, parts: Mapping[str, tuple[str, Translate]]) -> Architecture:
    return Architecture(**json.loads((PACKAGE / "assets" / "architectures" / f"{name}.json").read_text()), parts=parts)


SD15, SDXL = _architecture("sd15", SD1_PARTS), _architecture("sdxl", SDXL_PARTS)
KLEIN_4B = _architecture("klein", {})

_CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
_CONTEXT = "model.diffusion_model.{}.transformer_blocks.0.attn2.to_k.weight"


def alone(weights: Weights) -> tuple[str, tuple[str, Translate]] | None:
    """The model that a file in an original layout holds alone, and where; None of a file that is to hold more."""
    prefix = next((prefix for prefix in PREFIXES if prefix + MARK in weights), None)
    if prefix is None:
        return None
    return "transformer", (prefix, transformer_part if prefix + SCALE in weights else saved_part)


def recognise(weights: Weights, source: str, with_vae: bool = True) -> Architecture:
    """The architecture of a single file, from its keys, shapes and metadata.

    Args:
        weights: the file.
        source: named in errors.
        with_vae: it has to hold a VAE.

    Raises:
        UserError: a LoRA, a part of a checkpoint, or a checkpoint of another kind.
    """
    if any("lora" in key.lower() for key in weights):
        raise UserError(f"{source}: is a LoRA, not a checkpoint; give the checkpoint it belongs to")
    if _CONV_IN not in weights:
        raise UserError(f"{source}: has no weight {_CONV_IN}; expected a Stable Diffusion 1.x or XL checkpoint")
    edm = sorted(key for key in weights if key.startswith("edm_"))
    if edm:
        raise UserError(f"{source}: has {edm[0]}: trained by EDM, as Playground 2.5 and CosXL; not supported")
    channels = weights.size(_CONV_IN, 1)
    if channels != 4:
        raise UserError(f"{source}: its UNet takes {channels} channels, as inpainting models do; expected 4")
    sdxl = any(key.startswith(SDXL_PARTS["text_encoder_2"][0]) for key in weights)
    architecture = SDXL if sdxl else SD15
    absent = [part for part, (at, _) in architecture.parts.items() if not any(key.startswith(at) for key in weights)]
    if set(absent) - {"vae"}:
        kind = "of 2.x" if any(key.startswith("cond_stage_model.model.") for key in weights) else "incomplete"
        prefix, _ = architecture.parts[absent[-1]]
        raise UserError(f"{source}: is {kind}, it has no {prefix.rstrip('.')}; expected a Stable Diffusion 1.x or "
                        "XL checkpoint, or convert it with diffusers and give the folder")  # fmt: skip
    if absent and with_vae:
        raise UserError(f"{source}: holds no VAE; give one with --config.model.vae=FILE_OR_FOLDER")
    where = "middle_block.1" if sdxl else "input_blocks.1.1"
    context = _CONTEXT.format(where)
    if context not in weights:
        raise UserError(f"{source}: is incomplete, it has no weight {context}")
    width = weights.size(context, 1)
    expected = architecture.configs["unet"]["cross_attention_dim"]
    if width != expected:
        raise UserError(f"{source}: its UNet reads text of width {width}, that of {architecture.name} is {expected}")
    prefix, _ = architecture.parts["text_encoder"]
    if any(key.startswith(f"{prefix}embeddings.") for key in weights):
        architecture = replace(architecture, parts={**architecture.parts, "text_encoder": (prefix, bare)})
    return replace(architecture, scheduler={**architecture.scheduler, **_prediction(weights, source)})


def _prediction(weights: Weights, source: str) -> dict[str, Any]:
    """What the network predicts, and whether the last timestep has no signal, where a single file says it: in its
    metadata, or by an empty tensor of that name."""
    stated = weights.metadata.get("modelspec.prediction_type", "").lower()
    if stated not in ("", "epsilon", "v", "v_prediction"):
        raise UserError(f"{source}: its metadata has modelspec.prediction_type={stated!r}; expected epsilon or v")
    v = "v_pred" in weights or weights.metadata.get("ss_v_parameterization", "").lower() == "true"
    if v and stated == "epsilon":
        raise UserError(f"{source}: its metadata has modelspec.prediction_type='epsilon', and v_pred or "
                        "ss_v_parameterization says v; take out the wrong one")  # fmt: skip
    predicts = {"prediction_type": "v_prediction"} if v or stated.startswith("v") else {}
    return predicts | ({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if "ztsnr" in weights else {})
