"""Weights to and from the names and layouts of PyTorch, as diffusers and transformers write them.

Modules carry upstream's names, so a state path *is* the torch key; only the leaf's name and layout differ. Conversion
is total (every key is used once, every parameter is found) and bijective, bit for bit.
"""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from hgdpo_jax.models.layers import SHAPES
from hgdpo_jax.models.model_config import Json, read_config
from hgdpo_jax.models.preprocessing import CLIP, read_preprocessing
from hgdpo_jax.models.weights import STEMS, Weights, open_folder, write_weights
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import json_hash, write_json
from hgdpo_jax.run.index import Index

Model = TypeVar("Model", bound=nnx.Module)
# (state path joined by dots, array) → the array on its devices.
Place = Callable[[str, np.ndarray], jax.Array]
on_default_device: Place = lambda name, value: jax.device_put(value)  # noqa: E731
# Buffers that older transformers releases saved and newer ones compute, and PyTorch's count of a training.
_BUFFERS = ("position_ids", "num_batches_tracked")
# What a file of a whole CLIPModel has beside one of its towers.
_OF_CLIP = {"text_model", "vision_model", "text_projection", "visual_projection", "logit_scale"}


# The attention of VAEs that diffusers wrote before 2023, among them the official SD 1.x and sd-vae-ft-mse.
_BEFORE_2023 = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

# DINOv2 as transformers wrote it before its version 5, and as it is published; its layers are not BERT's, which lie
# deeper where they are read here.
_BEFORE_5 = {"attention.attention.query": "attention.q_proj", "attention.attention.key": "attention.k_proj"}
_BEFORE_5 |= {"attention.attention.value": "attention.v_proj", "attention.output.dense": "attention.o_proj"}


def _renamed(key: str) -> str:
    if key.startswith("encoder.layer."):
        for old, new in _BEFORE_5.items():
            key = key.replace(old, new)
    *modules, leaf = key.split(".")
    if modules and "attentions" in modules:
        modules[-1] = _BEFORE_2023.get(modules[-1], modules[-1])
    return ".".join([*modules, leaf])


def torch_key(path: tuple[Any, ...]) -> str:
    """`down_blocks.0.resnets.0.conv1.weight` for the path of a parameter."""
    *modules, leaf = (str(part) for part in path)
    leaf = "weight" if leaf in ("kernel", "scale", "embedding") else leaf
    return ".".join([*modules, leaf])


def to_torch_layout(leaf: str, value: np.ndarray) -> np.ndarray:
    """Linear [in, out] → [out, in]; Conv [H, W, in, out] → [out, in, H, W]; all else unchanged. A view."""
    if leaf != "kernel":
        return value
    return value.T if value.ndim == 2 else value.transpose(3, 2, 0, 1)


def _torch_shape(leaf: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return to_torch_layout(leaf, np.broadcast_to(np.float32(0), shape)).shape


def from_torch_layout(leaf: str, value: np.ndarray) -> np.ndarray:
    """The inverse of :func:`to_torch_layout`."""
    if leaf != "kernel":
        return value
    return value.T if value.ndim == 2 else value.transpose(2, 3, 1, 0)


def parameters(model: nnx.Module) -> dict[tuple[Any, ...], nnx.Variable]:
    """Path → parameter or buffer, LoRA left out: what a checkpoint of the model holds."""
    return {
        path: leaf
        for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat)))
        if not isinstance(leaf, nnx.LoRAParam)
    }


def keys(model: nnx.Module) -> list[str]:
    """The torch keys of a model's parameters."""
    return [torch_key(path) for path in parameters(model)]


def shapes(model: nnx.Module) -> dict[str, tuple[int, ...]]:
    """Torch key → torch's shape of a model's parameters."""
    return {torch_key(path): _torch_shape(str(path[-1]), leaf.shape) for path, leaf in parameters(model).items()}


def from_torch(
    weights: Mapping[str, np.ndarray],
    model: nnx.Module,
    source: str = "checkpoint",
    dtype: DTypeLike = jnp.float32,
    place: Place = on_default_device,
    expected_by: str = "its config.json",
) -> None:
    """Puts torch-named weights into a model (which may be abstract), in place and one by one.

    Args:
        weights: torch key → array in torch's layout; a lazy mapping is read tensor by tensor.
        model: its parameters decide which keys and shapes are expected.
        source: named in errors.
        dtype: of the parameters; buffers have their own.
        place: puts a parameter on its devices.
        expected_by: what the weights have to fit, for errors.

    Raises:
        UserError: a key is missing, superfluous or of another shape.
    """
    stored, expected = _matched(weights, model, source, expected_by)

    def read(key: str) -> tuple[tuple[Any, ...], nnx.Variable]:
        path, leaf = expected[key]
        kind = str(path[-1])
        value, shape = np.asarray(weights[stored[key]]), _torch_shape(kind, leaf.shape)
        _require_shape(key, value.shape, shape, source, expected_by)
        value = from_torch_layout(kind, value.reshape(shape))
        # The device's client copies transposed arrays. It might take over the others as they are, and the model would
        # then change with the file.
        own = jnp.dtype(dtype if isinstance(leaf, nnx.Param) else leaf.dtype)
        narrower = own.itemsize < value.dtype.itemsize
        with np.errstate(over="ignore"):
            value = value.astype(own, copy=value.flags.c_contiguous)
        if narrower and not np.isfinite(value).all():
            raise UserError(f"{source}: weight {key} is too large for {own}; take bfloat16")
        return path, leaf.replace(place(".".join(map(str, path)), value))

    # Reading and transposing release the GIL.
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        nnx.update(model, nnx.from_flat_state(list(pool.map(read, expected))))


def require_fit(
    weights: Mapping[str, np.ndarray], model: nnx.Module, source: str, expected_by: str = "its config.json"
) -> None:
    """As :func:`from_torch`, from headers alone: raises UserError where a name does not fit or, of files in the layout
    of diffusers and transformers, a shape. Reads no weight."""
    stored, expected = _matched(weights, model, source, expected_by)
    if isinstance(weights, Weights):
        for key, (path, leaf) in expected.items():
            shape = _torch_shape(str(path[-1]), leaf.shape)
            _require_shape(key, weights.shape(stored[key]), shape, source, expected_by)


def _require_shape(key: str, found: tuple[int, ...], shape: tuple[int, ...], source: str, expected_by: str) -> None:
    """Also takes a linear layer that was written as a convolution of one pixel."""
    if found not in (shape, (*shape, 1, 1)):
        raise UserError(f"{source}: weight {key} is {found}, not {shape}; does not fit {expected_by}")


def _matched(
    weights: Mapping[str, np.ndarray], model: nnx.Module, source: str, expected_by: str
) -> tuple[dict[str, str], dict[str, tuple[tuple[Any, ...], nnx.Variable]]]:
    """Torch key → key in the weights, and → path and parameter. Raises UserError as :func:`from_torch` does."""
    expected = {torch_key(path): (path, leaf) for path, leaf in parameters(model).items()}
    stored = {_renamed(key): key for key in weights if key in expected or key.rpartition(".")[2] not in _BUFFERS}
    # Older CLIP text checkpoints carry a prefix that transformers 5 dropped, and the other way round. A language model
    # has its text encoder under one.
    changes = (lambda key: key.removeprefix("text_model."), lambda key: f"text_model.{key}")
    for change in (*changes, lambda key: key.removeprefix("model.")):
        renamed = {change(key): key for key in stored}
        if not expected.keys() & stored.keys() and expected.keys() & renamed.keys():
            stored = renamed
    unused: set[str] = getattr(model, "unused", set())  # what a whole file has beside what such a model is made of
    missing, superfluous = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys() - unused)
    if any(key.endswith("embeddings.position_embedding.weight") for key in expected):  # a tower of CLIP
        beside = _OF_CLIP - {key.partition(".")[0] for key in expected}
        superfluous = [key for key in superfluous if key.partition(".")[0] not in beside]
    if missing and any("lora" in key for key in stored):
        raise UserError(f"{source}: holds a LoRA, not a model; give the model that it was trained on")
    for names, fault in ((missing, "missing"), (superfluous, "superfluous")):
        if names:
            raise UserError(
                f"{source}: weight {names[0]} is {fault} ({len(names)} in all); it does not fit {expected_by}"
            )
    return stored, expected


def to_torch(model: nnx.Module) -> dict[str, np.ndarray]:
    """Torch key → array in torch's layout, a view where the parameter is on CPU; LoRA weights are left out."""
    values = {path: np.asarray(leaf[...]) for path, leaf in parameters(model).items()}
    counts = {path: value.astype(np.int64) for path, value in values.items() if value.dtype == np.int32}  # PyTorch's
    return {torch_key(path): to_torch_layout(str(path[-1]), value) for path, value in (values | counts).items()}


def abstract(cls: Callable[..., Model], config: Mapping[str, Any], dtype: DTypeLike = jnp.float32) -> Model:
    """A model without weights: shapes only, to be filled by :func:`from_torch`.

    Raises:
        UserError: the config's values are not those of such a model; the line names the file that they were read from.
    """
    begin = f"{config.path}: " if isinstance(config, Json) else ""
    try:
        model = cls(config, rngs=SHAPES, dtype=jnp.dtype(dtype))
        if not all(isinstance(size, int) for leaf in parameters(model).values() for size in leaf.shape):
            raise TypeError("a size is null")
        return model
    except UserError as error:
        raise UserError(f"{begin}{str(error).removeprefix(begin)}") from error
    except (ValueError, TypeError, IndexError, ZeroDivisionError) as error:  # Flax's, of sizes that do not go together
        reason = " ".join(str(error).split())[:200]
        name = getattr(cls, "__name__", "model")
        raise UserError(f"{begin}{name} config: its values make no model ({reason}); copy the config again") from error


def load_model(
    cls: type[Model],
    folder: str | Path,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    place: Place = on_default_device,
) -> Model:
    """A model from its folder: config.json and safetensors.

    Args:
        cls: one of the models of this package.
        folder: as diffusers or transformers writes it.
        dtype: of the computation.
        param_dtype: of the parameters.
        place: puts a parameter on its devices.

    Raises:
        UserError: a file is missing or damaged, or the weights do not fit the config.
    """
    folder = Path(folder)
    model = abstract(cls, read_config(folder), dtype)
    from_torch(open_folder(folder), model, str(folder), param_dtype, place)
    return model


def folder_hash(folder: str | Path, index: Index | None = None) -> str:
    """sha256 over what a CLIP model's folder computes with, wherever it is: config and weights, and the image processor
    where it is not CLIP's.

    Args:
        folder: see :func:`load_model`.
        index: knows the hashes of files that were read before.
    """
    folder, index = Path(folder), index or Index()
    config = read_config(folder)
    content: dict[str, Any] = {"config": config, "weights": [*map(index.hash, open_folder(folder).files)]}
    how = read_preprocessing(folder, (config.get("vision_config") or config).get("image_size") or 224)
    return json_hash(content if how == CLIP else content | {"preprocessing": how})


def save_model(model: nnx.Module, folder: str | Path, dtype: DTypeLike = np.float32, prefix: str = "") -> None:
    """Writes config.json, which tells the dtype if it did, and weights in `dtype`; `prefix` comes before each key."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(model.config)  # type: ignore[attr-defined]  # all models have one
    config |= {key: np.dtype(dtype).name for key in ("dtype", "torch_dtype") if key in config}
    name = f"{STEMS[0] if '_diffusers_version' in config else STEMS[1]}.safetensors"
    write_weights(folder / name, {f"{prefix}{key}": value for key, value in to_torch(model).items()}, dtype)
    write_json(folder / "config.json", config)
