"""Stable Diffusion checkpoints: folders of diffusers, single files, another VAE or tokenizer, and LoRA."""

import functools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load, save
from transformers import CLIPTokenizer

from hgdpo_jax.diffusion.pipeline import Pipeline, load_pipeline
from hgdpo_jax.diffusion.source import open_source
from hgdpo_jax.diffusion.stable_diffusion import STABLE_DIFFUSION
from hgdpo_jax.diffusion.trajectory import from_noise
from hgdpo_jax.models import architectures
from hgdpo_jax.models.convert import abstract, from_torch, keys, to_torch
from hgdpo_jax.models.ldm import SD1_PARTS, Translate, bare, to_single_file, vae_part
from hgdpo_jax.models.lora import add_lora, lora_layers
from hgdpo_jax.run.errors import UserError
from tests import tiny
from tests.mutations.case import Case, written

VOCABULARY = ["!", "a", "b", "a</w>", "b</w>", "ab</w>", "<|startoftext|>", "<|endoftext|>"]
_TEXT = tiny.TINY_TEXT | {"vocab_size": len(VOCABULARY), "eos_token_id": len(VOCABULARY) - 1}
_LATENT = {"in_channels": 4, "out_channels": 4}  # as a single file has to have it
_CONFIGS = {"unet": tiny.ONE_LEVEL | _LATENT, "vae": tiny.TINY_VAE | {"latent_channels": 4}, "text_encoder": _TEXT}
_OF_SINGLE = _CONFIGS | {"text_encoder": tiny.TINY_TEXT}  # which has CLIP's own vocabulary
_SCHEDULER = tiny.SCHEDULER | {"clip_sample": True, "clip_sample_range": 1.0, "steps_offset": 1}
_VAE, _TEXT_WEIGHTS = "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
_UNET = "unet/diffusion_pytorch_model.safetensors"


def _base(folder: Path) -> None:
    """A base whose vocabulary is as small as its networks."""
    with mock.patch.multiple(tiny, TINY_TEXT=_TEXT, TINY_VAE=_CONFIGS["vae"], SCHEDULER=_SCHEDULER):
        tiny.write_base(folder, _CONFIGS["unet"])
    write_vocabulary(folder / "tokenizer")
    (folder / "README.md").write_text("---\nlicense: mit\n---\nA base.\n")


def write_vocabulary(folder: Path) -> None:
    """A few words in place of a tokenizer's own."""
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(VOCABULARY)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b</w>\n")


def read_base(folder: Path, base: str = "", **more: str) -> bool:
    """As `sample` opens a base, up to what it compiles."""
    given = {key: str(folder / place) for key, place in more.items()}
    pipeline = load_pipeline(folder / base, **given)
    for solver in ("ddpm", "ddim", "dpmpp_2m"):
        try:
            drawn = from_noise(pipeline.schedule, solver, 4)
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(drawn)) and drawn.clip > 0
        except UserError as error:
            assert "\n" not in str(error)
    _trace(pipeline)
    return True


def _trace(pipeline: Pipeline) -> None:
    """What a program of the pipeline's networks would be made of: they fit each other and compute."""
    ids = pipeline.tokenize(["a b", "b" * 90])
    encoders = [model for part, model in pipeline.models.items() if part.startswith("text_encoder")]
    for encoder, of_each in zip(encoders, np.moveaxis(ids.view(np.uint16).reshape(*ids.shape, 2), -1, 0), strict=False):
        assert of_each.max() < encoder.config["vocab_size"]
    pipeline.count_tokens(["a"])
    height, width, channels = pipeline.latent_shape((64, 64))

    def drawn(ids: jax.Array, latents: jax.Array) -> jax.Array:
        pipeline.text.empty(2, (64, 64))
        conditioning = pipeline.text(ids, (64, 64))
        predicted = pipeline.denoiser(latents, jnp.zeros(2, jnp.int32), *conditioning)
        return pipeline.vae.decode(predicted)

    found = jax.eval_shape(drawn, ids, jax.ShapeDtypeStruct((2, height, width, channels), jnp.float32))
    assert found.shape == (2, 64, 64, 3)


def read_single(folder: Path, architecture: str, configs: Mapping[str, dict[str, Any]]) -> bool:
    """Reads a single file of an architecture that has the sizes of some configs."""
    known = replace(getattr(architectures, architecture), configs=configs)
    with mock.patch.object(architectures, architecture, known):
        source = open_source(str(folder / "a.safetensors"))
    for part, config in source.configs.items():
        from_source(source, part, abstract(STABLE_DIFFUSION.models[part], config))
    return True


def single(configs: Mapping[str, dict[str, Any]], parts: Mapping[str, tuple[str, Translate]]) -> bytes:
    """A single file with random weights."""
    models = {part: tiny.random_model(STABLE_DIFFUSION.models[part], config, 0) for part, config in configs.items()}
    weights = {part: to_torch(model) for part, model in models.items()}
    tensors = to_single_file(weights, configs, parts)
    return save({key: np.ascontiguousarray(x) for key, x in tensors.items()}, {"modelspec.prediction_type": "epsilon"})


def from_source(source: Any, part: str, model: nnx.Module) -> None:
    """Fills a model from an open checkpoint, as :func:`hgdpo_jax.diffusion.pipeline.load_pipeline` does."""
    from_torch(source.open(part, keys(model)), model, f"{source.name}, {part}", expected_by=source.expected(part))


def read_lora(folder: Path, base: Path, name: str) -> bool:
    """Reads a base with a LoRA merged."""
    source = open_source(str(base), lora=str(folder / name))
    for part, config in source.configs.items():
        from_source(source, part, abstract(STABLE_DIFFUSION.models[part], config))
    return True


def loras(configs: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, bytes]]:
    """LoRA files in the forms in which people have them, of models by their configs."""
    models, rng = {}, np.random.default_rng(0)
    for part, config in configs.items():
        model = models[part] = tiny.random_model(STABLE_DIFFUSION.models[part], config, 0)
        add_lora(model, 2, 1.0, nnx.Rngs(0))
        for layer in lora_layers(model).values():
            layer.lora_B[...] = jnp.asarray(rng.standard_normal(layer.lora_B.shape), jnp.float32)

    def of(kind: str) -> dict[str, np.ndarray]:
        return STABLE_DIFFUSION.layout(models, {}).lora_weights(models, kind)

    peft = {f"base_model.model.{key[5:]}": x for key, x in of("peft").items() if key.startswith("unet.")}
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["to_q"], "use_dora": False,
                "alpha_pattern": {}, "init_lora_weights": True, "fan_in_fan_out": False}  # fmt: skip
    metadata = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in settings.items()})}
    return {
        "diffusers": {"a.safetensors": save(of("peft"), metadata)},
        "kohya": {"a.safetensors": save(of("kohya"), {"ss_network_dim": "2", "ss_network_alpha": "1"})},
        "peft": {"p/adapter_model.safetensors": save(peft), "p/adapter_config.json": json.dumps(settings).encode()},
    }


def _with_tokenizer_json(base: Mapping[str, bytes]) -> dict[str, bytes]:
    """A base whose tokenizer is in the one file that transformers writes now."""

    def save_tokenizer(folder: Path) -> None:
        write(folder / "base", base)
        CLIPTokenizer.from_pretrained(folder / "base" / "tokenizer").save_pretrained(folder / "tokenizer")

    saved = {name: content for name, content in written(save_tokenizer).items() if not name.startswith("base/")}
    return {name: content for name, content in base.items() if not name.startswith("tokenizer/")} | saved


def cases(place: Path) -> dict[str, Case]:
    """All of them by name; `place` gets what they have in common."""
    base = written(_base)
    write(place / "base", base)
    index = {"weight_map": dict.fromkeys(load(base[_VAE]), "a-00001.safetensors")}
    sharded = {name: content for name, content in base.items() if name != _VAE}
    sharded |= {"vae/a-00001.safetensors": base[_VAE]}
    sharded |= {"vae/diffusion_pytorch_model.safetensors.index.json": json.dumps(index).encode()}
    texts = [name for name in base if name.endswith((".json", ".txt", ".md"))]
    vae = {name: content for name, content in base.items() if name.startswith("vae/")}
    tokenizer = _with_tokenizer_json(base)
    of_novelai = SD1_PARTS | {"text_encoder": (SD1_PARTS["text_encoder"][0], bare)}
    on_base, file = {"base": place / "base"}, ["a.safetensors"]
    with_vae = functools.partial(read_base, base="base", vae="a.safetensors")
    read_file = functools.partial(read_single, architecture="SD15", configs=_OF_SINGLE)
    found = {
        "base": Case(base, [*texts, _UNET, _VAE, _TEXT_WEIGHTS], read_base),
        "sharded base": Case(sharded, ["vae/diffusion_pytorch_model.safetensors.index.json"], read_base),
        "tokenizer.json": Case(tokenizer, [name for name in tokenizer if name.startswith("tokenizer/")], read_base),
        "single file": Case({"a.safetensors": single(_OF_SINGLE, SD1_PARTS)}, file, read_file),
        "single file of NovelAI": Case({"a.safetensors": single(_OF_SINGLE, of_novelai)}, file, read_file),
        "another VAE": Case({"a.safetensors": base[_VAE]}, file, with_vae, on_base),
        "VAE of LDM": Case({"a.safetensors": single({"vae": _CONFIGS["vae"]}, {"vae": ("", vae_part)})}, file, with_vae,
                           on_base),
        "folder of a VAE": Case(vae, list(vae), functools.partial(read_base, base="base", vae="vae"), on_base),
    }  # fmt: skip
    lora = loras({part: config for part, config in _CONFIGS.items() if part != "vae"})
    for kind, files in lora.items():
        name = next(iter(files)).partition("/")[0]
        found[f"LoRA of {kind}"] = Case(
            files, list(files), functools.partial(read_lora, base=place / "base", name=name)
        )
    return found


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes files by their names in a folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
