"""Stable Diffusion 1.x, 2.x and XL: UNet, VAE, one or two CLIP text encoders, steps of β."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from transformers import CLIPTokenizer

from hgdpo_jax.config import ASSETS
from hgdpo_jax.diffusion.family import Configs, Family, Tokenizers
from hgdpo_jax.diffusion.recipe import Drawing
from hgdpo_jax.diffusion.schedule import NoiseSchedule
from hgdpo_jax.models import layouts
from hgdpo_jax.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from hgdpo_jax.models.text import CLIP_POSITIONS as POSITIONS
from hgdpo_jax.models.text import TextConditioner, both
from hgdpo_jax.models.unet import UNet2DConditionModel
from hgdpo_jax.models.vae import AutoencoderKL
from hgdpo_jax.run.errors import UserError

_LFS_POINTER = b"version https://git-lfs"


def read_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's, of a model folder. Raises UserError."""
    names = {path.name for path in folder.iterdir()}
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
        raise UserError(f"{folder}: has neither tokenizer.json nor vocab.json and merges.txt; copy the folder again")
    for name in sorted(names):
        with (folder / name).open("rb") as file:
            if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise UserError(f"{folder / name}: is a pointer of Git LFS, not the file; run git lfs pull where it is")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        length = min(tokenizer.model_max_length, POSITIONS)
        (ids,) = tokenizer(["a photo"], padding="max_length", max_length=length, truncation=True).input_ids
        if not 2 < len(ids) == length or not {tokenizer.bos_token_id, tokenizer.eos_token_id} <= {*ids}:
            raise ValueError(f"of a text it makes {len(ids)} ids, not {length} with begin and end")
        return tokenizer
    except Exception as error:  # transformers' and tokenizers' errors have no class in common
        reason = " ".join(str(error).split())
        raise UserError(f"{folder}: not a tokenizer that can be read ({reason}); copy the folder again") from error


def _usual_tokenizers(index: Mapping[str, Any]) -> Tokenizers:
    """All Stable Diffusions have CLIP's."""
    folder = ASSETS / "portraits" / "base" / "tokenizer"
    second = {"tokenizer_2": CLIPTokenizer.from_pretrained(folder, pad_token="!")} if "tokenizer_2" in index else {}
    return {"tokenizer": CLIPTokenizer.from_pretrained(folder)} | second


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Int[np.ndarray, "b s"]:
    """Token ids int32 [b, 77] of one tokenizer: begin, words, end, padding.

    `<|endoftext|>` in a caption is a token of its own, not the end, as in diffusers.
    """
    ids = tokenizer(
        list(captions),
        padding="max_length",
        max_length=min(tokenizer.model_max_length, POSITIONS),
        truncation=True,
        return_tensors="np",
    ).input_ids
    return ids.astype(np.int32)


def _ids(tokenizers: Tokenizers, captions: Sequence[str]) -> Int[np.ndarray, "b s"]:
    """XL's are of both tokenizers, see :mod:`hgdpo_jax.models.text`."""
    first = tokenize(tokenizers["tokenizer"], captions)
    return both(first, tokenize(tokenizers["tokenizer_2"], captions)) if "tokenizer_2" in tokenizers else first


def _count(tokenizers: Tokenizers, captions: Sequence[str]) -> list[int]:
    """With begin and end; the larger number of two tokenizers."""
    counts = [
        [len(ids) for ids in tokenizer(list(captions), verbose=False).input_ids] for tokenizer in tokenizers.values()
    ]
    return [max(of_each) for of_each in zip(*counts, strict=True)]


def _conditioner(
    name: str, models: Mapping[str, Any], tokenizers: Tokenizers, index: Mapping[str, Any]
) -> TextConditioner:
    return TextConditioner(
        models["text_encoder"],
        models.get("text_encoder_2"),
        empty_ids=tuple(_ids(tokenizers, [""])[0].tolist()),
        pad_2=_second_padding(name, tokenizers),
        zero_empty=bool(index.get("force_zeros_for_empty_prompt", False)),
    )


def _second_padding(name: str, tokenizers: Tokenizers) -> int:
    """The padding of the second tokenizer, once it is sure that words are the same to both."""
    if "tokenizer_2" not in tokenizers:
        return 0
    first, second = (tokenizers[part] for part in ("tokenizer", "tokenizer_2"))
    text = ["a photo of a cat, 35mm"]
    if not np.array_equal(first(text, return_tensors="np").input_ids, second(text, return_tensors="np").input_ids):
        raise UserError(f"model {name}: tokenizer and tokenizer_2 have different vocabularies; expected CLIP's")
    return int(second.pad_token_id)


def _check(name: str, configs: Configs, tokenizers: Tokenizers) -> None:
    """Raises UserError where the parts of a checkpoint are not of one model."""
    unet, vae = configs["unet"], configs["vae"]
    texts = [config for part, config in configs.items() if part.startswith("text_encoder")]
    channels, latent = unet.get("in_channels", 4), vae.get("latent_channels", 4)
    if channels != latent:
        kind = "as inpainting models do; " if channels == 9 else ""
        raise UserError(f"model {name}: its UNet takes {channels} channels, {kind}the latents of its VAE have "
                        f"{latent}")  # fmt: skip
    lengths = {min(tokenizer.model_max_length, POSITIONS) for tokenizer in tokenizers.values()}
    if len(lengths) > 1:
        raise UserError(f"model {name}: its tokenizers have model_max_length "
                        f"{' and '.join(map(str, sorted(lengths)))}; expected the same")  # fmt: skip
    for part, tokenizer in tokenizers.items():
        config = configs.get(part.replace("tokenizer", "text_encoder"), {})
        last, words = max(tokenizer.get_vocab().values()), config.get("vocab_size") or 49408
        if last >= words:
            raise UserError(f"model {name}: its {part} gives ids up to {last}, the text encoder has {words} "
                            "words; they belong to different models")  # fmt: skip
    width, given = unet["cross_attention_dim"], sum(config.get("hidden_size") or 512 for config in texts)
    if width != given:
        raise UserError(f"model {name}: its text encoders give embeddings of width {given}, its UNet reads "
                        f"{width}; they belong to different models")  # fmt: skip
    if unet.get("addition_embed_type") == "text_time":
        _check_addition(name, configs)


def _check_addition(name: str, configs: Configs) -> None:
    """Raises UserError unless XL's UNet reads the pooled text of the second encoder, and six sizes."""
    unet, second = configs["unet"], configs.get("text_encoder_2")
    if second is None:
        raise UserError(f"model {name}: its UNet is XL's, and it has no text_encoder_2; copy the folder again")
    width = 6 * (unet["addition_time_embed_dim"] or 0) + (second.get("projection_dim") or 512)
    given = unet["projection_class_embeddings_input_dim"]
    if width != given:
        raise UserError(f"model {name}: its UNet has projection_class_embeddings_input_dim={given}, its "
                        f"addition_time_embed_dim and text_encoder_2 make {width}; they belong to different "
                        "models")  # fmt: skip


STABLE_DIFFUSION = Family(
    title="Stable Diffusion",
    denoiser="unet",
    models={
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    },
    needed=("unet", "vae", "text_encoder"),
    tokenizers=("tokenizer", "tokenizer_2"),
    positions=POSITIONS,
    read_tokenizer=read_tokenizer,
    usual_tokenizers=_usual_tokenizers,
    tokenize=_ids,
    count=_count,
    conditioner=_conditioner,
    process=NoiseSchedule.from_config,
    overflows=False,
    trains=("lora", "all", "text_lora", "adapter"),
    check=_check,
    layout=lambda models, config: layouts.SDXL if "text_encoder_2" in models else layouts.SD1,
    drawing=lambda index: Drawing("dpmpp_2m", "DPMSolverMultistepScheduler", 50, 5.0),
    told=lambda tokenizers, models: {},
)
