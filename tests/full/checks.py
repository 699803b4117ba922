"""What is compared with diffusers and transformers, at whatever size: the outputs of a model, and a converted file."""

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from flax import nnx
from safetensors.numpy import save_file

from hgdpo_jax.diffusion import pipeline as pipelines
from hgdpo_jax.diffusion.stable_diffusion import STABLE_DIFFUSION
from hgdpo_jax.models.convert import load_model, save_model
from hgdpo_jax.models.weights import Weights
from tests.full.components import torch_model
from tests.full.original import single_file


def _inputs(part: str, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    if part.startswith("text_encoder"):
        ids = rng.integers(0, 49406, (2, 77), dtype=np.int32)
        ids[:, 0], ids[0, 9:], ids[1, 70:] = 49406, 49407, 49407
        return {"ids": ids}
    side = config["sample_size"] if part == "vae" else min(config["sample_size"], 64)
    if part == "vae":
        shape = (1, side // 8, side // 8, config["latent_channels"])
        return {"image": rng.uniform(-1, 1, (1, side, side, 3)).astype(np.float32),
                "latent": rng.standard_normal(shape, np.float32)}  # fmt: skip
    pooled = config.get("projection_class_embeddings_input_dim", 0) - 6 * config.get("addition_time_embed_dim", 0)
    return {
        "sample": rng.standard_normal((1, side, side, 4), np.float32),
        "t": np.array([601], np.int32),
        "context": rng.standard_normal((1, 77, config["cross_attention_dim"]), np.float32),
        "text_embeds": rng.standard_normal((1, pooled), np.float32),
        "time_ids": np.array([[512, 512, 0, 0, 512, 512]], np.int32),
    }


def _theirs(part: str, model: Any, given: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    tensors = {name: torch.from_numpy(value) for name, value in given.items()}
    tensors = {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in tensors.items()}
    channels_first = lambda x: x.permute(0, 3, 1, 2)  # noqa: E731
    with torch.no_grad():
        if part == "unet":
            added = {name: tensors[name] for name in ("text_embeds", "time_ids")}
            outputs = [
                model(
                    channels_first(tensors["sample"]), tensors["t"], tensors["context"], added_cond_kwargs=added
                ).sample
            ]
        elif part == "vae":
            encoded = model.encode(channels_first(tensors["image"])).latent_dist
            outputs = [encoded.mean, model.decode(channels_first(tensors["latent"])).sample]
        else:
            found = model(tensors["ids"].long(), output_hidden_states=True)
            pooled = found.text_embeds if part == "text_encoder_2" else found.pooler_output
            return [found.last_hidden_state.numpy(), found.hidden_states[-2].numpy(), pooled.numpy()]
    return [x.permute(0, 2, 3, 1).numpy() for x in outputs]


def _ours(part: str, model: Any, given: Mapping[str, jax.Array]) -> list[jax.Array]:
    if part == "unet":
        added = {name: given[name] for name in ("text_embeds", "time_ids")}
        return [model(given["sample"], given["t"], given["context"], added)]
    if part == "vae":
        return [model.encode(given["image"])[0], model.decode(given["latent"])]
    found = model(given["ids"])
    return [found.last_hidden_state, found.hidden_states[-2], found.pooled]


def largest_error(part: str, config: Mapping[str, Any], folder: Path) -> float:
    """Largest error of our model's outputs in float32 relative to the standard deviation of PyTorch's.

    PyTorch computes in float32 too, the VAE in float64: its normalisations sum millions of values, and in float32
    PyTorch itself is wrong by 2e-4 there.

    The weights are random and go through a folder; only one of the two models is in memory at a time.
    """
    given = _inputs(part, config)
    model = torch_model(part, config, seed=0)
    model.save_pretrained(folder)
    expected = _theirs(part, model.double() if part == "vae" else model, given)
    del model
    gc.collect()
    ours = load_model(STABLE_DIFFUSION.models[part], folder)
    found = nnx.jit(lambda m, values: _ours(part, m, values))(ours, jax.tree.map(jnp.asarray, given))
    return max(float(np.abs(a - b).max() / b.std()) for a, b in zip(map(np.asarray, found), expected, strict=True))


def unequal_keys(configs: Mapping[str, Mapping[str, Any]], base: Path, work: Path, dtype: Any) -> list[str]:
    """Keys in which a single file converted by us differs from the same file converted by diffusers; [] if in none.

    Args:
        configs: of the parts.
        base: a diffusers folder with those configs, read by diffusers only.
        work: an empty folder.
        dtype: of the file.
    """
    save_file(single_file(configs, dtype), work / "original.safetensors")
    kind = StableDiffusionXLPipeline if "text_encoder_2" in configs else StableDiffusionPipeline
    settings = {"config": str(base), "local_files_only": True, "dtype": torch.from_numpy(np.zeros(1, dtype)).dtype}
    kind.from_single_file(str(work / "original.safetensors"), **settings).save_pretrained(work / "theirs")
    gc.collect()
    pipeline = pipelines.load_pipeline(work / "original.safetensors", param_dtype=np.dtype(dtype).name)
    for part, model in pipeline.models.items():
        save_model(model, work / "ours" / part, np.dtype(dtype).type)
    different = []
    for part in pipeline.models:
        (ours,), (theirs,) = ((work / side / part).glob("*.safetensors") for side in ("ours", "theirs"))
        a, b = Weights(ours), Weights(theirs)
        assert len(b), "diffusers wrote nothing to compare with"
        different += [f"{part}: {key}" for key in sorted(a.keys() ^ b.keys())]
        different += [f"{part}: {key}" for key in a.keys() & b.keys() if not np.array_equal(a[key], b[key])]
    return different
