"""Lays out the embedded base pipeline, or puts a trained UNet into it.

python -m tools.make_assets.base PORTRAITS --vocabulary bpe_simple_vocab_16e6.txt.gz    all but the VAE, UNet random
python -m tools.make_assets.base PORTRAITS --unet EXPORT/unet                           the trained UNet, float16
"""

import argparse
import gzip
import json
from pathlib import Path

import numpy as np
from flax import nnx
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hgdpo_jax.devices.start import start
from hgdpo_jax.models.architectures import SD15
from hgdpo_jax.models.clip import CLIPTextModel
from hgdpo_jax.models.convert import load_model, save_model
from hgdpo_jax.models.unet import UNet2DConditionModel
from hgdpo_jax.run import command
from hgdpo_jax.run.files import write_json
from tools.make_assets.photographs import SIZE
from tools.make_assets.vae import CHANNELS, FACTOR

TEXT_ENCODER = {**SD15.configs["text_encoder"], "hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 4}
TEXT_ENCODER |= {"num_hidden_layers": 2, "pad_token_id": 49407, "projection_dim": 32}
UNET = {
    **SD15.configs["unet"],
    "attention_head_dim": 4,
    "block_out_channels": [64, 96, 128],
    "cross_attention_dim": TEXT_ENCODER["hidden_size"],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "in_channels": CHANNELS,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "out_channels": CHANNELS,
    "sample_size": SIZE // FACTOR,
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}
SCHEDULER = {
    "_class_name": "DPMSolverMultistepScheduler",
    "_diffusers_version": SD15.index["_diffusers_version"],
    "algorithm_type": "dpmsolver++",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",  # it learns form first, in fewer steps than from ε
    "solver_order": 2,
    "timestep_spacing": "linspace",
}
INDEX = {**SD15.index, "scheduler": ["diffusers", "DPMSolverMultistepScheduler"]}


def make_tokenizer(vocabulary: Path, folder: Path) -> None:
    """CLIP's tokenizer from OpenAI's file of merges, as vocab.json, merges.txt and tokenizer_config.json."""
    lines = gzip.decompress(vocabulary.read_bytes()).decode().split("\n")
    merges = lines[1 : 49152 - 256 - 2 + 1]
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{c}</w>" for c in letters), *("".join(m.split()) for m in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    config = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "model_max_length": 77,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": "<|endoftext|>",
    }
    write_json(folder / "tokenizer_config.json", config)
    ids = CLIPTokenizer.from_pretrained(folder)("a photo of a cat").input_ids
    assert ids == [49406, 320, 1125, 539, 320, 2368, 49407], ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("portraits", type=Path)
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--vocabulary", type=Path, help="as open_clip_torch ships it")
    group.add_argument("--unet", type=Path, help="folder of a trained UNet")
    arguments = parser.parse_args()
    start()
    base = arguments.portraits / "base"
    if arguments.unet:
        save_model(load_model(UNet2DConditionModel, arguments.unet), base / "unet", dtype=np.float16)
        return
    make_tokenizer(arguments.vocabulary, base / "tokenizer")
    save_model(CLIPTextModel(TEXT_ENCODER, rngs=nnx.Rngs(1)), base / "text_encoder", dtype=np.float16)
    save_model(UNet2DConditionModel(UNET, rngs=nnx.Rngs(2)), base / "unet", dtype=np.float16)
    write_json(base / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(base / "model_index.json", INDEX)


if __name__ == "__main__":
    command.run(main)
