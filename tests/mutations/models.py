"""Models: folders of diffusers and transformers, single files, LoRA, IP-Adapters, and the JSON beside them."""

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save

from hgdpo_jax.diffusion.pipeline import Pipeline, load_pipeline
from hgdpo_jax.diffusion.solvers import make_steps
from hgdpo_jax.diffusion.source import MODELS, open_source
from hgdpo_jax.faces.embedding import _ArcFace
from hgdpo_jax.models import architectures, ip_adapter
from hgdpo_jax.models.clip import CLIPModel
from hgdpo_jax.models.convert import abstract, folder_hash, from_torch, keys, load_model, to_torch
from hgdpo_jax.models.ldm import SD1_PARTS, to_single_file
from hgdpo_jax.models.lora import add_lora, lora_layers
from hgdpo_jax.models.preprocessing import read_preprocessing
from hgdpo_jax.models.unet import UNet2DConditionModel
from hgdpo_jax.results.exported import lora_weights
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.scoring.preference import judge
from tests import tiny
from tests.faces.test_embedding import network
from tests.mutations.case import Case, written

_VOCABULARY = ["!", "a", "b", "a</w>", "b</w>", "ab</w>", "<|startoftext|>", "<|endoftext|>"]
_TEXT = tiny.TINY_TEXT | {"vocab_size": len(_VOCABULARY), "eos_token_id": len(_VOCABULARY) - 1}
_LATENT = {"in_channels": 4, "out_channels": 4}  # as a single file has to have it
_CONFIGS = {"unet": tiny.ONE_LEVEL | _LATENT, "vae": tiny.TINY_VAE | {"latent_channels": 4}, "text_encoder": _TEXT}
_OF_SINGLE = _CONFIGS | {"text_encoder": tiny.TINY_TEXT}  # which has CLIP's own vocabulary
_VAE, _TEXT_WEIGHTS = "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
_UNET = "unet/diffusion_pytorch_model.safetensors"


def _base(folder: Path) -> None:
    """A base whose vocabulary is as small as its networks."""
    with mock.patch.multiple(tiny, TINY_TEXT=_TEXT, TINY_VAE=_CONFIGS["vae"]):
        tiny.write_base(folder, _CONFIGS["unet"])
    vocabulary = {token: number for number, token in enumerate(_VOCABULARY)}
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    (folder / "README.md").write_text("---\nlicense: mit\n---\nA base.\n")


def _read_base(folder: Path, base: str = "", **more: str) -> bool:
    """As `sample` opens a base, up to what it compiles."""
    given = {key: str(folder / place) for key, place in more.items()}
    pipeline = load_pipeline(folder / base, **given)
    for solver in ("ddpm", "ddim", "dpmpp_2m"):
        try:
            table = make_steps(pipeline.schedule, solver, 4)
            assert all(np.isfinite(column).all() for column in table)
        except UserError as error:
            assert "\n" not in str(error)
    _trace(pipeline)
    return True


def _trace(pipeline: Pipeline) -> None:
    """What a program of the pipeline's networks would be made of: they fit each other and compute."""
    ids = pipeline.tokenize(["a b", "b" * 90])
    assert ids.min() >= 0 and ids.max() < pipeline.text.text_encoder.embeddings.token_embedding.num_embeddings
    pipeline.count_tokens(["a"])
    height, width, channels = pipeline.latent_shape((64, 64))

    def drawn(ids: jax.Array, latents: jax.Array) -> jax.Array:
        conditioning = pipeline.text(ids, (64, 64))
        predicted = pipeline.unet(latents, jnp.zeros(2, jnp.int32), *conditioning)
        return pipeline.vae.decode(predicted)

    found = jax.eval_shape(drawn, ids, jax.ShapeDtypeStruct((2, height, width, channels), jnp.float32))
    assert found.shape == (2, 64, 64, 3)


def _with_tiny_parts() -> Any:
    """Stable Diffusion 1.5 as a single file has it, with the sizes of the base here."""
    return mock.patch.object(architectures, "SD15", replace(architectures.SD15, configs=_OF_SINGLE))


def _read_single(folder: Path) -> bool:
    with _with_tiny_parts():
        source = open_source(str(folder / "a.safetensors"))
    for part, config in source.configs.items():
        model = abstract(MODELS[part], config)
        from_source(source, part, model)
    return True


def from_source(source: Any, part: str, model: nnx.Module) -> None:
    """Fills a model from an open checkpoint, as :func:`hgdpo_jax.diffusion.pipeline.load_pipeline` does."""
    from_torch(source.open(part, keys(model)), model, part, expected_by=source.expected(part))


def _read_lora(folder: Path, base: Path, name: str) -> bool:
    source = open_source(str(base), lora=str(folder / name))
    for part, config in source.configs.items():
        from_source(source, part, abstract(MODELS[part], config))
    return True


def _read_scorer(folder: Path) -> bool:
    folder_hash(folder)
    model = load_model(CLIPModel, folder)
    how = read_preprocessing(folder, model.config["vision_config"]["image_size"])
    images = jax.ShapeDtypeStruct((2, 40, 48, 3), jnp.float32)
    found = jax.eval_shape(lambda images, ids: judge(model, images, ids, how), images, np.zeros((2, 77), np.int32))
    assert found.score.shape == (2,)
    return True


def _read_encoder(folder: Path) -> bool:
    model = ip_adapter.load_image_encoder(folder)
    size = model.config["image_size"]
    read_preprocessing(folder, size)
    pixels = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    jax.eval_shape(lambda pixels: ip_adapter.image_features(model, "ip_adapter_plus", pixels), pixels)
    return True


def _read_adapter(folder: Path, unet: UNet2DConditionModel) -> bool:
    adapter = ip_adapter.load(folder / "a.safetensors", unet)
    features = jax.ShapeDtypeStruct((1, 1, adapter.config["features"]), jnp.float32)
    assert jax.eval_shape(adapter, features)
    return True


def _read_arcface(folder: Path) -> bool:
    assert _ArcFace(str(folder / "a.onnx")).embed(jnp.zeros((1, 112, 112, 3))).shape[0] == 1
    return True


def _loras() -> dict[str, dict[str, bytes]]:
    """LoRA files in the forms in which people have them."""
    models, rng = {}, np.random.default_rng(0)
    for part in ("unet", "text_encoder"):
        model = models[part] = tiny.random_model(MODELS[part], _CONFIGS[part], 0)
        add_lora(model, 2, 1.0, nnx.Rngs(0))
        for layer in lora_layers(model).values():
            layer.lora_B[...] = jnp.asarray(rng.standard_normal(layer.lora_B.shape), jnp.float32)

    def of(kind: str) -> dict[str, np.ndarray]:
        return lora_weights(models, kind, "unet") | lora_weights(models, kind, "text")

    peft = {f"base_model.model.{key[5:]}": x for key, x in of("peft").items() if key.startswith("unet.")}
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["to_q"], "use_dora": False,
                "alpha_pattern": {}, "init_lora_weights": True, "fan_in_fan_out": False}  # fmt: skip
    metadata = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in settings.items()})}
    return {
        "diffusers": {"a.safetensors": save(of("peft"), metadata)},
        "kohya": {"a.safetensors": save(of("kohya"), {"ss_network_dim": "2", "ss_network_alpha": "1"})},
        "peft": {"p/adapter_model.safetensors": save(peft), "p/adapter_config.json": json.dumps(settings).encode()},
    }


def cases(place: Path) -> dict[str, Case]:
    """All of them by name; `place` gets what they have in common."""
    base = written(_base)
    _write(place / "base", base)
    parts = {part: to_torch(tiny.random_model(MODELS[part], config, 0)) for part, config in _OF_SINGLE.items()}
    single = save({key: np.ascontiguousarray(x) for key, x in to_single_file(parts, _OF_SINGLE, SD1_PARTS).items()},
                  {"modelspec.prediction_type": "epsilon"})  # fmt: skip
    index = {"weight_map": dict.fromkeys(parts["vae"], "a-00001.safetensors")}
    sharded = {name: content for name, content in base.items() if name != _VAE}
    sharded |= {"vae/a-00001.safetensors": base[_VAE]}
    sharded |= {"vae/diffusion_pytorch_model.safetensors.index.json": json.dumps(index).encode()}
    texts = [name for name in base if name.endswith((".json", ".txt", ".md"))]
    unet = abstract(UNet2DConditionModel, _CONFIGS["unet"])
    adapters = {kind: written(functools.partial(_write_adapter, unet, kind)) for kind in ip_adapter.KINDS}
    scorer = written(tiny.write_scorer) | {"preprocessor_config.json": _PREPROCESSOR}
    lora = _loras()
    found = {
        "base": Case(base, [*texts, _UNET, _VAE, _TEXT_WEIGHTS], _read_base),
        "sharded base": Case(sharded, ["vae/diffusion_pytorch_model.safetensors.index.json"], _read_base),
        "single file": Case({"a.safetensors": single}, ["a.safetensors"], _read_single),
        "another VAE": Case({"a.safetensors": base[_VAE]}, ["a.safetensors"],
                            functools.partial(_read_base, base="base", vae="a.safetensors"), {"base": place / "base"}),
        "scorer": Case(scorer, list(scorer), _read_scorer),
        "image encoder": Case(scorer, ["config.json"], _read_encoder),
        "arcface": Case(written(lambda folder: network(folder / "a.onnx")), ["a.onnx"], _read_arcface),
    }  # fmt: skip
    for kind, files in adapters.items():
        found[kind] = Case(files, list(files), functools.partial(_read_adapter, unet=unet))
    for kind, files in lora.items():
        name = next(iter(files)).partition("/")[0]
        found[f"LoRA of {kind}"] = Case(
            files, list(files), functools.partial(_read_lora, base=place / "base", name=name)
        )
    return found


_PREPROCESSOR = json.dumps({
    "crop_size": {"height": 32, "width": 32}, "do_center_crop": True, "do_normalize": True, "do_rescale": True,
    "do_resize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 3,
    "rescale_factor": 1 / 255, "size": {"shortest_edge": 32}, "image_processor_type": "CLIPImageProcessor",
}).encode()  # fmt: skip


def _write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _write_adapter(unet: UNet2DConditionModel, kind: str, folder: Path) -> None:
    config = ip_adapter.default_config(unet, kind, 6)
    ip_adapter.save(tiny.random_model(ip_adapter.IPAdapter, config, 0), folder / "a.safetensors")
