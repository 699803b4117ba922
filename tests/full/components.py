"""Stable Diffusion 1.5 and XL as diffusers and transformers build them, with random weights, whole or shrunken."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from hgdpo_jax.config import ASSETS
from hgdpo_jax.models.architectures import Architecture

TOKENIZER = ASSETS / "portraits" / "base" / "tokenizer"


def shrunken(architecture: Architecture) -> dict[str, dict[str, Any]]:
    """Its configs with the same blocks at a fraction of the width."""
    configs = {part: dict(config) for part, config in architecture.configs.items()}
    levels = len(configs["unet"]["block_out_channels"])
    configs["unet"] |= {"block_out_channels": [16, 32, 32, 32][:levels], "norm_num_groups": 8, "sample_size": 16}
    configs["unet"] |= {"attention_head_dim": 4, "cross_attention_dim": 24 if "text_encoder_2" in configs else 8}
    configs["vae"] |= {"block_out_channels": [8, 16, 16, 16], "norm_num_groups": 4, "sample_size": 64}
    small = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    configs["text_encoder"] |= small
    if "text_encoder_2" in configs:
        configs["text_encoder_2"] |= small | {"hidden_size": 16, "projection_dim": 20}
        configs["unet"]["transformer_layers_per_block"] = [1, 1, 2]
        configs["unet"]["projection_class_embeddings_input_dim"] = 6 * 256 + 20
    return configs


def torch_model(part: str, config: Mapping[str, Any], seed: int) -> torch.nn.Module:
    """A model of diffusers or transformers with random weights, in eval mode."""
    torch.manual_seed(seed)
    if part == "unet":
        model = UNet2DConditionModel.from_config(dict(config))
    elif part == "vae":
        model = AutoencoderKL.from_config(dict(config))
    else:
        kind = CLIPTextModelWithProjection if part == "text_encoder_2" else CLIPTextModel
        model = kind(CLIPTextConfig(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases that are not zero, scales that are not one
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:  # keeps the size of what goes through, where PyTorch's own initial values let it shrink
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return model.eval()


def write_folder(architecture: Architecture, configs: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """A diffusers folder, one model in memory at a time."""
    for seed, (part, config) in enumerate(configs.items()):
        torch_model(part, config, seed).save_pretrained(folder / part)
    for name in ("tokenizer", "tokenizer_2"):
        if name in architecture.index:
            padding = "!" if name == "tokenizer_2" else "<|endoftext|>"
            CLIPTokenizer.from_pretrained(TOKENIZER, pad_token=padding).save_pretrained(folder / name)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(dict(architecture.scheduler)))
    (folder / "model_index.json").write_text(json.dumps(dict(architecture.index)))
