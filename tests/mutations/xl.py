"""Stable Diffusion XL, which has two text encoders and two tokenizers: its folder, its single file and its LoRA."""

import functools
from pathlib import Path
from unittest import mock

from hgdpo_jax.models.ldm import SDXL_PARTS
from tests import tiny
from tests.mutations import checkpoints
from tests.mutations.case import Case, written

_WORDS = {"vocab_size": len(checkpoints.VOCABULARY), "eos_token_id": len(checkpoints.VOCABULARY) - 1}
_UNET = tiny.TINY_XL | {"layers_per_block": 1, "transformer_layers_per_block": [1, 1]}
_FIRST = tiny.TINY_TEXT | {"num_hidden_layers": 2}
_OF_LORA = {"unet": _UNET, "text_encoder": _FIRST | _WORDS, "text_encoder_2": tiny.TINY_TEXT_2 | _WORDS}
_OF_SINGLE = {"unet": _UNET | {"in_channels": 4, "out_channels": 4}, "vae": tiny.TINY_VAE | {"latent_channels": 4},
              "text_encoder": _FIRST, "text_encoder_2": tiny.TINY_TEXT_2}  # fmt: skip


def _base(folder: Path) -> None:
    """A base whose vocabularies are as small as its networks."""
    with mock.patch.multiple(tiny, TINY_TEXT=tiny.TINY_TEXT | _WORDS, TINY_TEXT_2=tiny.TINY_TEXT_2 | _WORDS):
        tiny.write_sdxl(folder, _UNET)
    for name in ("tokenizer", "tokenizer_2"):
        checkpoints.write_vocabulary(folder / name)


def cases(place: Path) -> dict[str, Case]:
    """All of them by name; `place` gets what they have in common."""
    base = written(_base)
    checkpoints.write(place / "xl", base)
    read_single = functools.partial(checkpoints.read_single, architecture="SDXL", configs=_OF_SINGLE)
    found = {
        "XL": Case(base, list(base), checkpoints.read_base),
        "single file of XL": Case({"a.safetensors": checkpoints.single(_OF_SINGLE, SDXL_PARTS)}, ["a.safetensors"],
                                  read_single),
    }  # fmt: skip
    read_lora = functools.partial(checkpoints.read_lora, base=place / "xl", name="a.safetensors")
    lora = checkpoints.loras(_OF_LORA)
    for kind in ("diffusers", "kohya"):
        files = lora[kind]
        found[f"LoRA of {kind} for XL"] = Case(files, list(files), read_lora)
    return found
