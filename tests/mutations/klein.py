"""FLUX.2-klein: its folder, its transformer as one file in the original names, and its LoRA."""

import functools
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save

from hgdpo_jax.diffusion.pipeline import Pipeline, load_pipeline
from hgdpo_jax.diffusion.sampler import Sampler
from hgdpo_jax.models.lora import add_lora, lora_layers
from hgdpo_jax.results.exported import write_checkpoint
from tests import klein, tiny
from tests.mutations import checkpoints
from tests.mutations.case import Case, written

_SIZE = (32, 24)


def _read(folder: Path, file: str = "") -> bool:
    """As `sample` opens a base, up to what it compiles."""
    _trace(load_pipeline(folder / file))
    return True


def _read_lora(folder: Path, base: Path) -> bool:
    _trace(load_pipeline(base, lora=str(folder / "a.safetensors")))
    return True


def _trace(pipeline: Pipeline) -> None:
    """What a program of the pipeline's networks would be made of: they fit each other and compute."""
    assert (pipeline.tokenize(["a man", "b" * 90])[:, : klein.TOKENS] < klein.TEXT["vocab_size"]).all()
    sampler = Sampler(pipeline, tiny.mesh(), solver="euler", steps=3, guidance=1.0, batch=2, seed=0)
    sampler.traced(_SIZE)


def _loras(pipeline: Pipeline) -> dict[str, bytes]:
    """LoRA files in the forms in which people have them."""
    rng = np.random.default_rng(0)
    add_lora(pipeline.denoiser, 2, 4.0, nnx.Rngs(0), ("attention", "feed_forward"))
    for layer in lora_layers(pipeline.denoiser).values():
        layer.lora_B[...] = jnp.asarray(rng.standard_normal(layer.lora_B.shape), jnp.float32)
    models = {"transformer": pipeline.denoiser}
    diffusers, kohya = (pipeline.layout.lora_weights(models, kind) for kind in ("peft", "kohya"))
    metadata = {"ss_network_dim": "2", "ss_network_alpha": "4"}
    return {"diffusers": save(diffusers), "kohya": save(kohya, metadata)}


def cases(place: Path) -> dict[str, Case]:
    """All of them by name; `place` gets what they have in common."""
    base = written(klein.write)
    checkpoints.write(place / "klein", base)
    pipeline = load_pipeline(place / "klein")
    file = written(lambda folder: write_checkpoint(pipeline, folder / "a.safetensors", "klein"))
    around = {name: content for name, content in base.items() if not name.endswith("model.safetensors")}
    around |= {name: base[name] for name in base if name.startswith(("vae/", "text_encoder/"))}
    found = {
        "klein": Case(base, list(base), _read),
        "one file of klein": Case(around | file, list(file), functools.partial(_read, file="a.safetensors")),
    }
    for kind, content in _loras(pipeline).items():
        found[f"LoRA of {kind} for klein"] = Case(
            {"a.safetensors": content}, ["a.safetensors"], functools.partial(_read_lora, base=place / "klein")
        )
    return found
