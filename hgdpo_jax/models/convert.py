"""Weights to and from the names and layouts of PyTorch, as diffusers and transformers write them.

Modules carry upstream's names, so a state path *is* the torch key. What is left is one rule: the leaf's name and its
transposition. Conversion is total (every key is used once, every parameter is found) and bijective, bit for bit.
"""

import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from hgdpo_jax.errors import UserError
from hgdpo_jax.models.model_config import ModelConfig

Model = TypeVar("Model", bound=nnx.Module)
WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")
# Buffers that older transformers releases saved and newer ones compute.
_BUFFERS = ("position_ids",)


def torch_key(path: tuple[Any, ...]) -> str:
    """`down_blocks.0.resnets.0.conv1.weight` for the path of a parameter."""
    *modules, leaf = (str(part) for part in path)
    leaf = "weight" if leaf in ("kernel", "scale", "embedding") else leaf
    return ".".join([*modules, leaf])


def to_torch_layout(leaf: str, value: np.ndarray) -> np.ndarray:
    """Linear [in, out] → [out, in]; Conv [H, W, in, out] → [out, in, H, W]; all else unchanged."""
    if leaf != "kernel":
        return value
    return np.ascontiguousarray(value.T if value.ndim == 2 else value.transpose(3, 2, 0, 1))


def from_torch_layout(leaf: str, value: np.ndarray) -> np.ndarray:
    """The inverse of :func:`to_torch_layout`."""
    if leaf != "kernel":
        return value
    return np.ascontiguousarray(value.T if value.ndim == 2 else value.transpose(2, 3, 1, 0))


def parameters(model: nnx.Module) -> dict[tuple[Any, ...], nnx.Param]:
    """Path → parameter, LoRA left out: what a checkpoint of the model holds."""
    return {
        path: leaf
        for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))
        if not isinstance(leaf, nnx.LoRAParam)
    }


def from_torch(weights: Mapping[str, np.ndarray], model: nnx.Module, source: str = "checkpoint") -> None:
    """Puts torch-named weights into a model (which may be abstract), in place.

    Args:
        weights: torch key → array in torch's layout.
        model: its parameters decide which keys and shapes are expected.
        source: named in errors.

    Raises:
        UserError: a key is missing, superfluous or of another shape.
    """
    rest = {key: value for key, value in weights.items() if key.rpartition(".")[2] not in _BUFFERS}
    found: list[tuple[tuple[Any, ...], nnx.Param]] = []
    expected = parameters(model)
    # Older CLIP text checkpoints carry a prefix that transformers 5 dropped, and the other way round.
    names = {torch_key(path) for path in expected}
    if not names & rest.keys():
        for change in (lambda k: k.removeprefix("text_model."), lambda k: f"text_model.{k}"):
            renamed = {change(key): value for key, value in rest.items()}
            if names & renamed.keys():
                rest = renamed
                break
    for path, leaf in expected.items():
        key = torch_key(path)
        if key not in rest:
            raise UserError(f"{source}: weight {key} is missing; the file does not fit its config.json")
        value = from_torch_layout(str(path[-1]), np.asarray(rest.pop(key)))
        if value.shape != leaf.shape:
            raise UserError(
                f"{source}: weight {key} is {to_torch_layout(str(path[-1]), value).shape}, "
                f"its config.json asks for {to_torch_layout(str(path[-1]), np.empty(leaf.shape)).shape}"
            )
        found.append((path, leaf.replace(jnp.asarray(value, jnp.float32))))
    if rest:
        raise UserError(f"{source}: weight {sorted(rest)[0]} is superfluous ({len(rest)} in all); wrong config.json?")
    nnx.update(model, nnx.from_flat_state(found))


def to_torch(model: nnx.Module) -> dict[str, np.ndarray]:
    """Torch key → array in torch's layout, float32; LoRA weights are left out."""
    return {
        torch_key(path): to_torch_layout(str(path[-1]), np.asarray(leaf[...]))
        for path, leaf in parameters(model).items()
    }


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a model folder.

    Raises:
        UserError: no safetensors file, or a damaged one.
    """
    for name in WEIGHTS:
        if (folder / name).is_file():
            try:
                return load_file(folder / name)
            except SafetensorError as error:
                raise UserError(f"{folder / name}: not a whole safetensors file ({error}); copy it again") from error
    raise UserError(f"{folder}: no weights; expected {' or '.join(WEIGHTS)}")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder. Raises UserError when there is none or it is not JSON."""
    path = folder / "config.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; expected a model folder as diffusers writes it") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error})") from error


def abstract(cls: Callable[..., Model], config: Mapping[str, Any], dtype: Any = jnp.float32) -> Model:
    """A model without weights: shapes only, to be filled by :func:`from_torch`."""
    # Tracing every initialiser takes seconds, and a process may load a model more than once.
    return nnx.clone(_abstract(cls, ModelConfig(config), jnp.dtype(dtype)))


@functools.cache
def _abstract(cls: Callable[..., Model], config: ModelConfig, dtype: jnp.dtype) -> Model:
    return nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0), dtype=dtype))


def load_model(cls: type[Model], folder: str | Path, dtype: jnp.dtype = jnp.float32) -> Model:
    """A model from its folder: config.json and one safetensors file. Parameters are float32, `dtype` is for compute."""
    folder = Path(folder)
    model = abstract(cls, read_config(folder), dtype)
    from_torch(read_weights(folder), model, str(folder))
    return model


def save_model(model: nnx.Module, folder: str | Path, dtype: type[np.floating] = np.float32) -> None:
    """Writes config.json and weights in `dtype`, each under a temporary name first."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(model.config)  # type: ignore[attr-defined]
    name = WEIGHTS[0] if "_diffusers_version" in config else WEIGHTS[1]
    temporary = folder / f"{name}.partial"
    weights = {key: value.astype(dtype) for key, value in to_torch(model).items()}
    save_file(weights, temporary, metadata={"format": "pt"})
    os.replace(temporary, folder / name)
    temporary = folder / "config.json.partial"
    temporary.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    os.replace(temporary, folder / "config.json")
