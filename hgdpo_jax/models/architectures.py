"""The configs of Stable Diffusion 1.5 and XL, which single files leave out; and which of the two a file holds."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hgdpo_jax.models.ldm import SD1_PARTS, SDXL_PARTS, Translate, bare_clip
from hgdpo_jax.models.weights import Weights
from hgdpo_jax.run.errors import UserError

VERSION = "0.42.1"  # of diffusers, whose folders these configs are written into


@dataclass(frozen=True)
class Architecture:
    """Configs by part, as in a diffusers folder, and where a single file keeps each part."""

    name: str
    configs: Mapping[str, Mapping[str, Any]]
    scheduler: Mapping[str, Any]
    index: Mapping[str, Any]
    parts: Mapping[str, tuple[str, Translate]]


_CLIP_L = {
    "architectures": ["CLIPTextModel"],
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "vocab_size": 49408,
}
_CLIP_G = _CLIP_L | {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
_VAE = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": VERSION,
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "scaling_factor": 0.18215,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
_UNET = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": VERSION,
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "in_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
_SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": VERSION,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": VERSION,
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}

SD15 = Architecture(
    name="Stable Diffusion 1.5",
    configs={"unet": _UNET, "vae": _VAE, "text_encoder": _CLIP_L},
    scheduler=_SCHEDULER,
    index=_INDEX,
    parts=SD1_PARTS,
)
SDXL = Architecture(
    name="Stable Diffusion XL",
    configs={
        "unet": _UNET
        | {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "attention_head_dim": [5, 10, 20],
            "block_out_channels": [320, 640, 1280],
            "cross_attention_dim": 2048,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "projection_class_embeddings_input_dim": 2816,
            "sample_size": 128,
            "transformer_layers_per_block": [1, 2, 10],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "use_linear_projection": True,
        },
        "vae": _VAE | {"force_upcast": True, "sample_size": 1024, "scaling_factor": 0.13025},
        "text_encoder": _CLIP_L,
        "text_encoder_2": _CLIP_G,
    },
    scheduler=_SCHEDULER
    | {"_class_name": "EulerDiscreteScheduler", "interpolation_type": "linear", "use_karras_sigmas": False}
    | {"timestep_spacing": "leading"},
    index={key: value for key, value in _INDEX.items() if "safety" not in key}
    | {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": True,
        "image_encoder": [None, None],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
    },
    parts=SDXL_PARTS,
)

_CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
_CONTEXT = "model.diffusion_model.{}.transformer_blocks.0.attn2.to_k.weight"


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
    channels = weights.shape(_CONV_IN)[1]
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
    width = weights.shape(context)[1]
    expected = architecture.configs["unet"]["cross_attention_dim"]
    if width != expected:
        raise UserError(f"{source}: its UNet reads text of width {width}, that of {architecture.name} is {expected}")
    prefix, _ = architecture.parts["text_encoder"]
    if any(key.startswith(f"{prefix}embeddings.") for key in weights):
        architecture = replace(architecture, parts={**architecture.parts, "text_encoder": (prefix, bare_clip)})
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
