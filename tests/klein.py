"""A FLUX.2-klein with random weights, small enough for any test, as diffusers writes it."""

from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer

from tests.models.parity import randomise

LAYERS, TOKENS = (1, 2, 3), 48  # of the text encoder that are read; of a prompt
# What Qwen3's own template makes of a user's message.
TEMPLATE = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
TRANSFORMER: dict[str, Any] = dict(
    in_channels=16,
    num_layers=1,
    num_single_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=96,
    timestep_guidance_channels=32,
    axes_dims_rope=(4, 4, 4, 4),
    guidance_embeds=False,
)
VAE: dict[str, Any] = dict(
    block_out_channels=(8, 16),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=4,
)
TEXT: dict[str, Any] = dict(
    vocab_size=264,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6},
)


def tokenizer(**settings: Any) -> Qwen2Tokenizer:
    """Of single bytes, with the marks of Qwen3's, in whose place in the vocabulary they come."""
    vocabulary = {byte: i for i, byte in enumerate(sorted(ByteLevel.alphabet()))}
    made = Qwen2Tokenizer(vocab=vocabulary, merges=[], chat_template=TEMPLATE, **settings)
    made.add_tokens([AddedToken(mark, special=True) for mark in ("<|im_start|>", "<|im_end|>")])
    made.add_tokens([AddedToken(mark, normalized=False) for mark in ("<think>", "</think>")])
    return made


def pipeline() -> Flux2KleinPipeline:
    """Random, and the statistics of its VAE too."""
    vae = randomise(AutoencoderKLFlux2(**VAE))
    random = torch.Generator().manual_seed(1)
    vae.bn.running_mean.normal_(generator=random)
    vae.bn.running_var.uniform_(2.9, 3.5, generator=random)
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=randomise(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**TEXT))),
        tokenizer=tokenizer(model_max_length=TOKENS),
        transformer=randomise(Flux2Transformer2DModel(**TRANSFORMER)),
    )


def write(folder: Path) -> Path:
    """The folder of :func:`pipeline`."""
    pipeline().save_pretrained(folder)
    return folder
