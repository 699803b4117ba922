"""A LoRA file merged into a model's weights while these are read, so that a training goes on from it.

W + (alpha / rank) · B A, in float32 (Hu et al. 2021), for linear layers and convolutions. The file may be PEFT's or
diffusers', of any year, or kohya's: its keys tell which.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hgdpo_jax.models.ldm import unet_name
from hgdpo_jax.models.weights import LazyWeights, Weights, refuse_pickle
from hgdpo_jax.run.errors import UserError

_SUFFIXES = (  # of A and B
    (".lora_A.weight", ".lora_B.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    (".lora_down.weight", ".lora_up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
)


class _Layer(NamedTuple):
    """Keys of a layer's A, B and alpha in the file; where it has no alpha, the metadata tell the scale, or it is 1."""

    down: str
    up: str
    alpha: str


def _bare(key: str) -> str:
    """The key of a parameter without the prefix that text encoders have in some files."""
    return key.removeprefix("text_model.")


def _names(part: str, module: str, config: Mapping[str, Any]) -> list[str]:
    """The names that files give to a module of a model."""
    if part == "unet":
        # kohya's scripts train XL under the names of the original code.
        kohya = [f"lora_unet_{name}".replace(".", "_") for name in (module, unet_name(module, config))]
        attention, _, leaf = module.removesuffix(".0").rpartition(".")
        # PEFT's own files hold one model, and diffusers' first files of a UNet had no prefix.
        return [f"unet.{module}", f"base_model.model.{module}", module, f"unet.{attention}.processor.{leaf}",
                f"{attention}.processor.{leaf}", *kohya]  # fmt: skip
    inside = f"text_model.{module}"
    prefixes = ("lora_te", "lora_te1") if part == "text_encoder" else ("lora_te2",)
    return [f"{part}.{inside}", f"{part}.{module}", *(f"{prefix}_{inside}".replace(".", "_") for prefix in prefixes)]


def _layer(names: Sequence[str], weights: Weights) -> _Layer | None:
    for name in names:
        for down, up in _SUFFIXES:
            if name + down in weights and name + up in weights:
                return _Layer(name + down, name + up, f"{name}.alpha")
    return None


class LoRAFile:
    """A LoRA of a pipeline's models.

    Args:
        path: a .safetensors file.
        models: part → its config and the keys of its parameters.

    Raises:
        UserError: not a LoRA that can be read, or one for another model.
    """

    def __init__(self, path: Path, models: Mapping[str, tuple[Mapping[str, Any], Sequence[str]]]) -> None:
        refuse_pickle(path)
        self.weights, self._path = Weights(path), path
        self._layers: dict[tuple[str, str], _Layer] = {}
        for part, (config, keys) in models.items():
            for key in keys:
                module, _, leaf = _bare(key).rpartition(".")
                found = _layer(_names(part, module, config), self.weights) if leaf == "weight" else None
                if found:
                    self._layers[part, _bare(key)] = found
        used = {key for layer in self._layers.values() for key in layer}
        rest = sorted(self.weights.keys() - used)
        if rest:
            kind = "is not a LoRA" if not self._layers else f"has {rest[0]} ({len(rest)} in all)"
            raise UserError(f"LoRA {path}: {kind}; expected a LoRA of this model's linear layers and convolutions, as "
                            "PEFT, diffusers or kohya's scripts write it")  # fmt: skip
        self._alphas = _stated_alphas(path, self.weights.metadata)

    def into(self, part: str, weights: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """The weights of a part with the LoRA merged, read tensor by tensor."""
        layers = {key: layer for (name, key), layer in self._layers.items() if name == part}

        def merged(key: str) -> np.ndarray:
            value, layer = weights[key], layers.get(_bare(key))
            if layer is None:
                return value
            return np.asarray(value, np.float32) + self._change(part, layer, value.shape, key)

        return LazyWeights({key: partial(merged, key) for key in weights})

    def _change(self, part: str, layer: _Layer, shape: tuple[int, ...], key: str) -> np.ndarray:
        """(alpha / rank) · B A in the shape of the layer's weight, float32.

        Raises:
            UserError: it has another shape.
        """
        down, up = (np.asarray(self.weights[name], np.float32) for name in (layer.down, layer.up))
        rank = down.shape[0]
        alpha = float(self.weights[layer.alpha]) if layer.alpha in self.weights else self._alphas.get(part, rank)
        product = up.reshape(up.shape[0], -1) @ down.reshape(rank, -1)
        if product.size != np.prod(shape) or up.shape[0] != shape[0]:
            raise UserError(f"LoRA {self._path}: {layer.down} and {layer.up} make {product.shape}, {key} is {shape}; "
                            "it is of another model")  # fmt: skip
        return alpha / rank * product.reshape(shape)


def _stated_alphas(path: Path, metadata: Mapping[str, str]) -> dict[str, float]:
    """Part → alpha as PEFT's adapter_config.json or diffusers' metadata state it.

    Raises:
        UserError: alphas that differ from layer to layer, which can be read from kohya's files only.
    """
    beside = path.with_name("adapter_config.json")
    stated = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    if path.name == "adapter_model.safetensors" and beside.is_file():
        stated = {f"unet.{key}": value for key, value in json.loads(beside.read_text()).items()}
    if any(value for key, value in stated.items() if key.endswith((".alpha_pattern", ".use_dora", ".use_rslora"))):
        raise UserError(f"LoRA {path}: its layers have alphas of their own; expected one for all")
    return {key.removesuffix(".lora_alpha"): float(v) for key, v in stated.items() if key.endswith(".lora_alpha")}
