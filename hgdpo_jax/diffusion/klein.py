"""FLUX.2-klein: a flow of latents in patches, a transformer, and Qwen3's states of a chat for text."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Int
from transformers import CLIPTokenizer

from hgdpo_jax.config import ASSETS
from hgdpo_jax.diffusion import stable_diffusion
from hgdpo_jax.diffusion.family import Configs, Family, Tokenizers
from hgdpo_jax.diffusion.flow import FlowSchedule
from hgdpo_jax.diffusion.recipe import Drawing
from hgdpo_jax.models import layouts
from hgdpo_jax.models.chat import LENGTH, byte_tokenizer, chat, chat_ids, length_of, open_tokenizer
from hgdpo_jax.models.flux2 import Flux2Transformer2DModel
from hgdpo_jax.models.flux2_vae import AutoencoderKLFlux2
from hgdpo_jax.models.qwen3 import Qwen3Model
from hgdpo_jax.models.text import FluxText
from hgdpo_jax.run.errors import UserError

_STATES = 3  # of Qwen3 that are read
_PATCH = 4  # cells of a latent


@cache
def _clip() -> CLIPTokenizer:
    return stable_diffusion.read_tokenizer(ASSETS / "portraits" / "base" / "tokenizer")


def _tokenize(tokenizers: Tokenizers, captions: Sequence[str]) -> Int[np.ndarray, "b s"]:
    """Qwen3's 512 ids, and behind them CLIP's 77, which scorers read."""
    own = chat_ids(tokenizers["tokenizer"], captions)
    return np.concatenate([own, stable_diffusion.tokenize(_clip(), captions)], axis=1)


def _usual_tokenizers(index: Mapping[str, Any]) -> Tokenizers:
    """Of bytes, in place of Qwen3's, which is not shipped: it does for plans."""
    del index
    return {"tokenizer": byte_tokenizer()}


def _count(tokenizers: Tokenizers, captions: Sequence[str]) -> list[int]:
    """With those of the chat around them."""
    return [
        len(ids) for ids in tokenizers["tokenizer"]([chat(caption) for caption in captions], verbose=False).input_ids
    ]


def _told(tokenizers: Tokenizers, models: Mapping[str, Any]) -> dict[str, Any]:
    """Of a model that is smaller than klein-4B, which diffusers takes for granted."""
    usual = {"max_sequence_length": LENGTH, "text_encoder_out_layers": (9, 18, 27)}
    own = {
        "max_sequence_length": length_of(tokenizers["tokenizer"]),
        "text_encoder_out_layers": models["text_encoder"].read,
    }
    return {key: value for key, value in own.items() if value != usual[key]}


def _conditioner(name: str, models: Mapping[str, Any], tokenizers: Tokenizers, index: Mapping[str, Any]) -> FluxText:
    tokenizer = tokenizers["tokenizer"]
    empty = chat_ids(tokenizer, [""])[0]
    return FluxText(models["text_encoder"], empty_ids=tuple(empty.tolist()), padding=tokenizer.pad_token_id)


def _check(name: str, configs: Configs, tokenizers: Tokenizers) -> None:
    """Raises UserError where the parts of a checkpoint are not of one model."""
    transformer, vae, text = configs["transformer"], configs["vae"], configs["text_encoder"]
    channels, latent = transformer.get("in_channels", 128), _PATCH * vae.get("latent_channels", 32)
    if channels != latent:
        raise UserError(f"model {name}: its transformer takes {channels} channels, patches of its VAE's latents have "
                        f"{latent}; they belong to different models")  # fmt: skip
    width, given = transformer.get("joint_attention_dim", 15360), _STATES * text["hidden_size"]
    if width != given:
        raise UserError(f"model {name}: its text encoder gives embeddings of width {given}, its transformer reads "
                        f"{width}; they belong to different models")  # fmt: skip
    last, words = max(tokenizers["tokenizer"].get_vocab().values()), text["vocab_size"]
    if last >= words:
        raise UserError(f"model {name}: its tokenizer gives ids up to {last}, the text encoder has {words} words; they "
                        "belong to different models")  # fmt: skip


def _drawing(index: Mapping[str, Any]) -> Drawing:
    """Of the base, and of the model that was distilled from it, which draws in few steps without guidance."""
    return Drawing("euler", "", 4, 1.0) if index.get("is_distilled") else Drawing("euler", "", 50, 4.0)


KLEIN = Family(
    title="FLUX.2-klein",
    denoiser="transformer",
    models={"transformer": Flux2Transformer2DModel, "vae": AutoencoderKLFlux2, "text_encoder": Qwen3Model},
    needed=("transformer", "vae", "text_encoder"),
    tokenizers=("tokenizer",),
    positions=LENGTH,
    read_tokenizer=open_tokenizer,
    usual_tokenizers=_usual_tokenizers,
    tokenize=_tokenize,
    count=_count,
    conditioner=_conditioner,
    process=FlowSchedule.from_config,
    overflows=True,
    trains=("lora", "all"),
    check=_check,
    layout=lambda models, config: layouts.klein(config),
    drawing=_drawing,
    told=_told,
)
