"""What stands beside a checkpoint: scorers, image encoders, IP-Adapters and the network of faces."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from hgdpo_jax.faces.embedding import _ArcFace
from hgdpo_jax.models import ip_adapter
from hgdpo_jax.models.clip import CLIPModel, CLIPVisionModelWithProjection
from hgdpo_jax.models.convert import abstract, folder_hash, load_model, save_model
from hgdpo_jax.models.preprocessing import read_preprocessing
from hgdpo_jax.models.unet import UNet2DConditionModel
from hgdpo_jax.scoring.preference import judge
from tests import tiny
from tests.faces.test_embedding import network
from tests.mutations.case import Case, written

_ENCODER = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1,
            "image_size": 32, "patch_size": 16, "projection_dim": 8}  # fmt: skip
_PROCESSOR = {
    "crop_size": {"height": 32, "width": 32}, "do_center_crop": True, "do_normalize": True, "do_rescale": True,
    "do_resize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 3,
    "rescale_factor": 1 / 255, "size": {"shortest_edge": 32}, "image_processor_type": "CLIPImageProcessor",
}  # fmt: skip


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


def cases() -> dict[str, Case]:
    """All of them by name."""
    unet = abstract(UNet2DConditionModel, tiny.ONE_LEVEL)
    scorer = written(tiny.write_scorer)
    encoder = written(lambda folder: save_model(tiny.random_model(CLIPVisionModelWithProjection, _ENCODER, 0), folder))
    old = {"preprocessor_config.json": json.dumps(_PROCESSOR).encode()}
    new = {"processor_config.json": json.dumps({"image_processor": _PROCESSOR}).encode()}
    found = {
        "scorer": Case(scorer | old, [*scorer, *old], _read_scorer),
        "processor of a scorer": Case(scorer | new, list(new), _read_scorer),
        "image encoder": Case(encoder, list(encoder), _read_encoder),
        "scorer as image encoder": Case(scorer, ["config.json"], _read_encoder),
        "arcface": Case(written(lambda folder: network(folder / "a.onnx")), ["a.onnx"], _read_arcface),
    }
    for kind in ip_adapter.KINDS:
        files = written(functools.partial(_write_adapter, unet, kind))
        found[kind] = Case(files, list(files), functools.partial(_read_adapter, unet=unet))
    return found


def _write_adapter(unet: UNet2DConditionModel, kind: str, folder: Path) -> None:
    config = ip_adapter.default_config(unet, kind, 6)
    ip_adapter.save(tiny.random_model(ip_adapter.IPAdapter, config, 0), folder / "a.safetensors")
