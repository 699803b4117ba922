"""A random pipeline, pair shards and a config, small enough for the tests."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

from hgdpo_jax import config as configuration
from hgdpo_jax.config import ASSETS
from hgdpo_jax.data import shards
from hgdpo_jax.data.record import Record, features
from hgdpo_jax.devices.sharding import path_name
from hgdpo_jax.models.architectures import SDXL
from hgdpo_jax.models.clip import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection
from hgdpo_jax.models.convert import abstract, save_model
from hgdpo_jax.models.unet import UNet2DConditionModel
from hgdpo_jax.models.vae import AutoencoderKL
from hgdpo_jax.run.files import write_json
from hgdpo_jax.run.settings import validate
from hgdpo_jax.training.monitor import Monitor
from hgdpo_jax.training.step import TrainState
from tools.make_assets import base as embedded
from tools.make_assets.base import INDEX, TEXT_ENCODER, UNET
from tools.make_assets.vae import CONFIG as VAE

LATENT = (4, 4, 8)
SCHEDULER = embedded.SCHEDULER | {"prediction_type": "epsilon"}  # as SD1.5
# As few layers as have the structure of SD1.5: compiling them is most of what the tests do.
TINY_UNET = UNET | {"block_out_channels": [8, 16], "attention_head_dim": 2, "norm_num_groups": 4, "sample_size": 4}
TINY_UNET |= {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"]}
TINY_UNET |= {"up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]}
TINY_TEXT = TEXT_ENCODER | {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
TINY_UNET |= {"cross_attention_dim": 8, "in_channels": LATENT[-1], "out_channels": LATENT[-1]}
# One resolution: each kind of layer but those between resolutions, in half the time.
ONE_LEVEL = TINY_UNET | {"block_out_channels": [8], "down_block_types": ["CrossAttnDownBlock2D"]}
ONE_LEVEL |= {"up_block_types": ["CrossAttnUpBlock2D"]}
TINY_TEXT_2 = TINY_TEXT | {"architectures": ["CLIPTextModelWithProjection"], "hidden_act": "gelu", "hidden_size": 12}
TINY_TEXT_2 |= {"num_hidden_layers": 2, "projection_dim": 20}
# Everything SDXL does, at two layers per block, which kohya's names of its LoRA count on.
TINY_XL = TINY_UNET | {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "attention_head_dim": [2, 4],
    "block_out_channels": [8, 16],
    "cross_attention_dim": 8 + 12,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "layers_per_block": 2,
    "projection_class_embeddings_input_dim": 6 * 4 + 20,
    "transformer_layers_per_block": [1, 2],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}
TINY_VAE = VAE | {"block_out_channels": [8] * 4, "latent_channels": LATENT[-1], "norm_num_groups": 4}
TINY_VAE |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
TINY_VAE["scaling_factor"] = 0.9


def random_model(cls: Callable[..., nnx.Module], config: dict[str, Any], seed: int) -> nnx.Module:
    """A model with random weights, made in NumPy: nothing is compiled."""
    model, rng = abstract(cls, config), np.random.default_rng(seed)

    def value(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        fan_in = max(1, math.prod(leaf.shape[:-1]))
        offset = 1.0 if path_name(path).endswith(("scale", "running_var")) else 0.0
        return jnp.asarray(offset + rng.standard_normal(leaf.shape) * fan_in**-0.5 * (leaf.ndim > 1), leaf.dtype)

    nnx.update(model, jax.tree.map_with_path(value, nnx.state(model)))
    return model


def write_base(folder: Path, unet: dict[str, Any] = TINY_UNET) -> Path:
    """A diffusers folder with random weights and CLIP's tokenizer."""
    save_model(random_model(UNet2DConditionModel, unet, 0), folder / "unet")
    save_model(random_model(AutoencoderKL, TINY_VAE, 1), folder / "vae")
    save_model(random_model(CLIPTextModel, TINY_TEXT, 2), folder / "text_encoder")
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(folder / "model_index.json", INDEX)
    shutil.copytree(ASSETS / "portraits" / "base" / "tokenizer", folder / "tokenizer")
    return folder


def write_sdxl(folder: Path, unet: dict[str, Any] = TINY_XL) -> Path:
    """The same in the shape of SDXL."""
    save_model(random_model(UNet2DConditionModel, unet, 0), folder / "unet")
    save_model(random_model(AutoencoderKL, TINY_VAE, 1), folder / "vae")
    save_model(random_model(CLIPTextModel, TINY_TEXT | {"num_hidden_layers": 2}, 2), folder / "text_encoder")
    save_model(random_model(CLIPTextModelWithProjection, TINY_TEXT_2, 3), folder / "text_encoder_2")
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    index = {key: value for key, value in SDXL.index.items() if key != "scheduler"}
    write_json(folder / "model_index.json", index | {"scheduler": INDEX["scheduler"]})
    for name, padding in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        shutil.copytree(ASSETS / "portraits" / "base" / "tokenizer", folder / name)
        settings = json.loads((folder / name / "tokenizer_config.json").read_text())
        write_json(folder / name / "tokenizer_config.json", settings | {"pad_token": padding})
    return folder


def write_scorer(folder: Path, seed: int = 3) -> Path:
    """A random CLIPModel for 32x32 images."""
    tower = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    text = {**tower, "vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407}
    config = {"projection_dim": 8, "text_config": text, "vision_config": {**tower, "image_size": 32, "patch_size": 16}}
    save_model(random_model(CLIPModel, config, seed), folder)
    return folder


def write_photographs(folder: Path, train: int = 5, heldout: int = 2) -> Path:
    """Some of the embedded portraits."""
    source = ASSETS / "portraits"
    lines = [json.loads(line) for line in (source / "captions.jsonl").read_text().splitlines()]
    chosen = [line for line in lines if line["split"] == "train"][:train]
    chosen += [line for line in lines if line["split"] == "heldout"][:heldout]
    (folder / "photographs").mkdir(parents=True)
    for line in chosen:
        shutil.copyfile(source / line["file"], folder / line["file"])
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in chosen))
    return folder


# What the embedded default does otherwise.
AS_THE_PAPER = ("recipe.weight=0.5", "recipe.blocks=paper", "train.lora_modules=attention")


def settings(folder: Path, train: int, heldout: int, **own: Any) -> list[str]:
    """Writes the inputs of a tiny run of commands; returns its settings, as a user types them.

    Args:
        folder: which gets base, scorer and photographs.
        train, heldout: numbers of photographs.
        **own: settings that take the place of those here.
    """
    values = {
        "model.base": write_base(folder / "base", ONE_LEVEL),
        "pairs.scorer": write_scorer(folder / "scorer"),
        "evaluate.scorer": "",
        "evaluate.other_scorer": "",
        "adapter.weights": "",
        "data.photographs": write_photographs(folder / "photographs", train, heldout),
        "data.resolutions": "32x32",
        "data.mirror": False,
        **dict(setting.split("=") for setting in AS_THE_PAPER),
        "pairs.pool_size": 2,
        "pairs.steps": 2,
        "pairs.batch": 4,
        "pairs.shard_size": 4,
        "evaluate.steps": 2,
        "evaluate.batch": 4,
        "evaluate.images_per_prompt": 1,
        "train.batch": 4,
        "train.steps": 1,
        "train.warmup": 0,
        "train.lora_rank": 2,
        "train.log_every": 1,
        "train.checkpoint_every": 1,
    }
    return [f"--config.{key}={value}" for key, value in (values | own).items()]


def clip_ids(rng: np.random.Generator) -> np.ndarray:
    """A random caption of three tokens."""
    ids = np.full(77, 49407, np.int32)
    ids[0], ids[1:4] = 49406, rng.integers(0, 49000, 3)
    return ids


def write_pairs(
    folder: Path,
    train: int = 24,
    heldout: int = 8,
    shape: tuple[int, ...] = LATENT,
    resolution: str = "32x32",
    caption: Callable[[np.random.Generator], np.ndarray] = clip_ids,
) -> Path:
    """Finished shards of random latents in `folder` = W/stageN/pairs."""
    rng = np.random.default_rng(0)
    schema = features(shape[-1], len(caption(np.random.default_rng(0))), loser=True)
    assert not shards.begin(folder, {"test": 1})
    paths: dict[str, list[Path]] = {}
    for role, count in (("train", train), ("heldout", heldout)):
        split = f"{role}_{resolution}"
        paths[split] = [shards.shard_path(folder, split, i, 2) for i in range(2)]
        for i, path in enumerate(paths[split]):
            shards.write_shard(path, schema, [record(f"{role}{i}-{n}", rng, shape, caption) for n in range(count // 2)])
    shards.finish(folder, schema, paths, {resolution: shape})
    return folder


def record(
    name: str,
    rng: np.random.Generator,
    shape: tuple[int, ...] = LATENT,
    caption: Callable[[np.random.Generator], np.ndarray] = clip_ids,
) -> Record:
    """A pair of random latents."""
    return {
        "id": name,
        "caption": "a caption",
        "input_ids": caption(rng),
        "winner": rng.standard_normal(shape).astype(np.float16),
        "loser": rng.standard_normal(shape).astype(np.float16),
        "winner_number": 0,
        "winner_score": 1.0,
        "loser_score": 0.0,
    }


def config(base: Path, stage: str = "stage1", **train: object) -> ConfigDict:
    """A short run on the tiny base."""
    result = configuration.default()
    result.stage = stage
    result.model.base = str(base)
    result.model.dtype = "float32"
    result.data.resolutions = ("32x32",)
    result.evaluate.update(sampler="ddim", steps=2, guidance=1.0, batch=8, images_per_prompt=1)
    result.train.update(steps=4, batch=8, warmup=2, lr=1e-2, lambda_stat=1.0, lora_rank=2, lora_alpha=2.0)
    result.train.update(checkpoint_every=2, log_every=1, eval_every=100, **train)
    validate(result)
    return result


def glance(monitor: Monitor, state: TrainState, step: int) -> None:
    """In place of `Monitor.evaluate`, which compiles three programs, where a test is not about what people see."""
    monitor.log.write({"heldout/loss/total": 0.0}, step)


def mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over the first devices."""
    devices = np.array(jax.devices()[: data * fsdp * tensor]).reshape(data, fsdp, tensor)
    return Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
