"""A diffusers folder in memory: UNet, VAE, text encoder, tokenizer and noise schedule."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int
from transformers import CLIPTokenizer

from hgdpo_jax.diffusion.schedule import NoiseSchedule
from hgdpo_jax.errors import UserError
from hgdpo_jax.models.clip import CLIPTextModel
from hgdpo_jax.models.convert import load_model
from hgdpo_jax.models.unet import UNet2DConditionModel
from hgdpo_jax.models.vae import AutoencoderKL

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


@dataclass(frozen=True)
class Pipeline:
    """The parts of a Stable Diffusion checkpoint. `folder` is where they came from."""

    folder: Path
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    schedule: NoiseSchedule

    def tokenize(self, captions: Sequence[str]) -> Int[np.ndarray, "b s"]:
        """Token ids, padded and cut to the 77 positions CLIP has, as diffusers does."""
        return tokenize(self.tokenizer, captions)


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Int[np.ndarray, "b s"]:
    """Token ids int32 [b, 77]: begin, words, end, padding."""
    ids = tokenizer(
        list(captions),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="np",
    ).input_ids
    return ids.astype(np.int32)


def load(folder: str | Path, dtype: str = "float32") -> Pipeline:
    """Reads a diffusers folder; `dtype` is the compute dtype of UNet and text encoder, the VAE computes in float32.

    Raises:
        UserError: no such folder, a part of it missing, or weights that do not fit their config.json.
    """
    folder = Path(folder)
    if not str(folder) or not folder.is_dir():
        raise UserError(f"model {str(folder)!r}: no such folder; set --config.model.base to a diffusers folder")
    for part in PARTS:
        if not (folder / part).is_dir():
            raise UserError(f"model {folder}: has no folder {part}; a diffusers folder has {', '.join(PARTS)}")
    compute = jnp.dtype(dtype)
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    return Pipeline(
        folder=folder,
        unet=load_model(UNet2DConditionModel, folder / "unet", dtype=compute),
        vae=load_model(AutoencoderKL, folder / "vae"),
        text_encoder=load_model(CLIPTextModel, folder / "text_encoder", dtype=compute),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        schedule=NoiseSchedule.from_config(scheduler),
    )


def weights_hash(folder: str | Path) -> str:
    """sha256 over the safetensors files of a model folder, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).rglob("*.safetensors")):
        digest.update(str(path.relative_to(folder)).encode())
        with path.open("rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
    return digest.hexdigest()
