"""A LoRA file merged into a model's weights while these are read, so that a training goes on from it.

W + (alpha / rank) · B A, in float32 (Hu et al. 2021), for linear layers and convolutions. The file may be PEFT's or
diffusers', of any year, or kohya's, and of FLUX.2 ComfyUI's: its keys tell which.
"""

import json
import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hgdpo_jax.models import flux2_original
from hgdpo_jax.models.ldm import Stored, unet_name
from hgdpo_jax.models.model_config import read_json
from hgdpo_jax.models.weights import LazyWeights, Weights, refuse_pickle
from hgdpo_jax.run.errors import UserError

# What follows the name of a layer: PEFT's A and B, perhaps with the name of an adapter; diffusers' and kohya's.
_FACTOR = re.compile(
    r"(?P<layer>.+?)(\.lora_(?P<peft>[AB])(\.\w+)?|(\.lora\.|\.lora_linear_layer\.|\.lora_|_lora\.)(?P<side>down|up))\.weight"
)
_ALPHA = re.compile(r"(?P<layer>.+?)(\.lora|\.lora_linear_layer|_lora)?\.alpha")
_PEFT = "base_model.model."  # how keys of PEFT's own files begin, each of which is of one model
_COMFY = "diffusion_model."  # those of ComfyUI and ai-toolkit
_BEFORE_0_19 = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}  # of diffusers
_FILES = ("adapter_model", "pytorch_lora_weights")  # in folders of PEFT and of diffusers
# PEFT's settings under which W + (alpha / rank) · B A is not what it computes.
_UNLIKE = ("alpha_pattern", "use_dora", "use_rslora", "fan_in_fan_out")
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq")  # so do these kinds of init_lora_weights
# Part → its config, and torch key → shape of its parameters.
Models = Mapping[str, tuple[Mapping[str, Any], Mapping[str, tuple[int, ...]]]]


class _Layer(NamedTuple):
    """Keys of a layer's A, B and alpha in the file; where it has no alpha, the settings tell the scale, or it is 1."""

    down: str
    up: str
    alpha: str | None


class _Match(NamedTuple):
    """What a file has for a weight of a part: its layer, and how that is made of the layer in the file."""

    part: str
    key: str
    shape: tuple[int, ...]
    layer: _Layer
    where: Stored


def _layers(weights: Weights) -> dict[str, _Layer]:
    """The layers of a file by the names that it gives them."""
    downs: dict[str, str] = {}
    ups: dict[str, str] = {}
    alphas: dict[str, str] = {}
    for key in weights:
        if match := _FACTOR.fullmatch(key):
            is_down = match["peft"] == "A" or match["side"] == "down"
            (downs if is_down else ups).setdefault(match["layer"], key)
        elif match := _ALPHA.fullmatch(key):
            alphas.setdefault(match["layer"], key)
    return {name: _Layer(downs[name], ups[name], alphas.get(name)) for name in downs if name in ups}


def _bare(key: str) -> str:
    """The key of a parameter without the prefix that text encoders have in some files."""
    return key.removeprefix("text_model.")


def _places(part: str, module: str, config: Mapping[str, Any]) -> list[Stored]:
    """Where files may have a module of a model."""
    if part == "unet":
        return [Stored(name) for name in _of_unet(module, config)]
    if part == "transformer":
        return _of_transformer(module, config)
    return [Stored(name) for name in _of_text(part, module)]


def _of_unet(module: str, config: Mapping[str, Any]) -> list[str]:
    # kohya's scripts train XL under the names of the original code.
    kohya = [f"lora_unet_{name}".replace(".", "_") for name in (module, unet_name(module, config))]
    attention, _, leaf = module.removesuffix(".0").rpartition(".")
    # diffusers' first files of a UNet had no prefix.
    return [f"unet.{module}", _PEFT + module, module, f"unet.{attention}.processor.{leaf}",
            f"{attention}.processor.{leaf}", *kohya]  # fmt: skip


def _of_transformer(module: str, config: Mapping[str, Any]) -> list[Stored]:
    """diffusers' names, and ComfyUI's and kohya's, which are the original ones."""
    names = [Stored(f"{prefix}{module}") for prefix in ("transformer.", _COMFY, _PEFT, "")]
    original = flux2_original.module(module, config)
    if original.key == flux2_original.SWAPPED:
        return names
    kohya = f"lora_unet_{original.key}".replace(".", "_")
    return names + [original._replace(key=name) for name in (_COMFY + original.key, _PEFT + original.key, kohya)]


def _of_text(part: str, module: str) -> list[str]:
    inside = f"text_model.{module}"
    attention, _, leaf = inside.rpartition(".")
    old = f"{part}.{attention}.{_BEFORE_0_19.get(leaf, leaf)}"
    prefixes = ("lora_te", "lora_te1") if part == "text_encoder" else ("lora_te2",)
    kohya = [f"{prefix}_{name}".replace(".", "_") for prefix in prefixes for name in (inside, module)]
    return [f"{part}.{inside}", f"{part}.{module}", old, _PEFT + inside, _PEFT + module, *kohya]


class LoRAFile:
    """A LoRA of a pipeline's models.

    Args:
        path: a .safetensors file, or a folder that holds one.
        models: those of the pipeline.

    Attributes:
        weights: the file.
        alpha: where it stands in another file, such as PEFT's adapter_config.json.

    Raises:
        UserError: not a LoRA that can be read, or one for another model.
    """

    alpha: float | None = None

    def __init__(self, path: Path, models: Models) -> None:
        self._path = path = lora_file(path)
        self.weights = Weights(path)
        if not self.weights:
            raise UserError(f"LoRA {path}: holds no tensors")
        in_file = _layers(self.weights)
        if any(name.startswith(_PEFT) for name in in_file):
            part = self._part(in_file, models)
            models, self._settings = {part: models[part]}, _beside(path, part)
            self.alpha = self._settings.get(f"{part}.lora_alpha")
        else:
            self._settings = _in_header(path, self.weights.metadata)
        self._found = {(match.part, match.key): match for match in self._fitting(in_file, models)}
        used = {key for match in self._found.values() for key in match.layer}
        rest = sorted(self.weights.keys() - used)
        swapped = [key for key in rest if flux2_original.SWAPPED.replace(".", "_") in key.replace(".", "_")]
        if swapped and swapped == rest:  # ComfyUI merges it as it was trained, diffusers in its own order of the halves
            raise UserError(f"LoRA {path}: has {swapped[0]}: programs disagree which of its halves is the scale; "
                            "expected a LoRA without that layer")  # fmt: skip
        if rest:
            kind = "is not a LoRA" if not in_file else f"has {rest[0]} ({len(rest)} in all)"
            raise UserError(f"LoRA {path}: {kind}; expected a LoRA of this model's linear layers and convolutions, as "
                            "PEFT, diffusers or kohya's scripts write it")  # fmt: skip
        _require_plain(path, self._settings)

    def _part(self, in_file: Mapping[str, _Layer], models: Models) -> str:
        """The part that a file of PEFT's own is for. Names do not tell two text encoders apart, sizes do.

        Raises:
            UserError: none, or more than one.
        """
        fitting = []
        for part in models:
            matches = self._matched(in_file, {part: models[part]})
            if {match.layer for match in matches} == {*in_file.values()} and all(map(self._fits, matches)):
                fitting.append(part)
        if len(fitting) != 1:
            which = " and ".join(fitting) or "none of " + ", ".join(models)
            raise UserError(f"LoRA {self._path}: fits {which}; expected PEFT's file of one of this model's networks")
        return fitting[0]

    def _fitting(self, in_file: Mapping[str, _Layer], models: Models) -> list[_Match]:
        """As :meth:`_matched`. Raises UserError for a layer of another size."""
        matches = self._matched(in_file, models)
        for match in matches:
            if not self._fits(match):
                layer = match.layer
                down, up = (self.weights.shape(key) for key in (layer.down, layer.up))
                raise UserError(f"LoRA {self._path}: {layer.down} is {down} and {layer.up} {up}, {match.key} is "
                                f"{match.shape}; it is of another model")  # fmt: skip
        return matches

    @staticmethod
    def _matched(in_file: Mapping[str, _Layer], models: Models) -> list[_Match]:
        """One for each weight that the file has a LoRA for; `key` is bare."""
        found = []
        for part, (config, shapes) in models.items():
            for key, shape in shapes.items():
                module, _, leaf = _bare(key).rpartition(".")
                places = _places(part, module, config) if leaf == "weight" else []
                there = [place for place in places if place.key in in_file][:1]
                found += [_Match(part, _bare(key), shape, in_file[place.key], place) for place in there]
        return found

    def _fits(self, match: _Match) -> bool:
        """Whether B A has as many numbers as the weight, or three of its kind, in as many rows."""
        (layer, shape), times = (match.layer, match.shape), 1 if match.where.third is None else 3
        down, up = self.weights.shape(layer.down), self.weights.shape(layer.up)
        if len(down) < 2 or len(up) < 2 or not down[0]:
            return False
        size = up[0] * math.prod(down[1:])
        return math.prod(up[1:]) == down[0] and up[0] == times * shape[0] and size == times * math.prod(shape)

    def into(self, part: str, weights: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """The weights of a part with the LoRA merged, read tensor by tensor."""
        matches = {key: match for (name, key), match in self._found.items() if name == part}
        absent = sorted(matches.keys() - {_bare(key) for key in weights})
        if absent:
            raise UserError(f"LoRA {self._path}: is for {absent[0]}, which the model's files do not have")

        def merged(key: str) -> np.ndarray:
            value, match = weights[key], matches.get(_bare(key))
            if match is None:
                return value
            return np.asarray(value, np.float32) + self._change(match).reshape(value.shape)

        return LazyWeights({key: partial(merged, key) for key in weights})

    def _change(self, match: _Match) -> np.ndarray:
        """(alpha / rank) · B A, float32 [out, in]; of three layers in one, the rows of this one.

        Raises:
            UserError: alpha is no number.
        """
        layer = match.layer
        down, up = (np.asarray(self.weights[name], np.float32) for name in (layer.down, layer.up))
        rank = down.shape[0]
        if layer.alpha is None:
            alpha = self._settings.get(f"{match.part}.lora_alpha", rank)
        elif self.weights[layer.alpha].size == 1:
            alpha = float(self.weights[layer.alpha].item())
        else:
            shape = self.weights.shape(layer.alpha)
            raise UserError(f"LoRA {self._path}: {layer.alpha} is {shape}; expected one number")
        return alpha / rank * (match.where.read(up.reshape(up.shape[0], -1)) @ down.reshape(rank, -1))


def lora_file(path: Path) -> Path:
    """The LoRA in a folder, or the file itself.

    Raises:
        UserError: there is none, or more than one.
    """
    if not path.is_dir():
        refuse_pickle(path)
        return path
    files = sorted(path.glob("*.safetensors"))
    named = [file for file in files if file.stem in _FILES] or files
    if len(named) == 1:
        return named[0]
    if not named:
        refuse_pickle(*(file for file in sorted(path.glob("*.bin")) if file.stem in _FILES))
    found = ", ".join(file.name for file in named) or "no .safetensors file"
    raise UserError(f"LoRA {path}: is a folder with {found}; give the file")


def _beside(path: Path, part: str) -> dict[str, Any]:
    """The settings in PEFT's adapter_config.json, which alone tells the scale; keys as :func:`_in_header` has them."""
    settings = path.with_name("adapter_config.json")
    if not settings.is_file():
        raise UserError(f"LoRA {path}: is PEFT's, and its scale stands in adapter_config.json; put that file beside it")
    return {f"{part}.{key}": value for key, value in read_json(settings).items()}


def _in_header(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """`PART.KEY` → PEFT's settings, where diffusers wrote them into the file."""
    try:
        found = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"LoRA {path}: its lora_adapter_metadata is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"LoRA {path}: its lora_adapter_metadata is no JSON object")
    return found


def _require_plain(path: Path, settings: Mapping[str, Any]) -> None:
    """Raises UserError for settings under which a LoRA does not act as :class:`LoRAFile` says."""
    for name, value in settings.items():
        key = name.rpartition(".")[2]
        unlike = key == "init_lora_weights" and str(value).startswith(_CHANGES_THE_BASE)
        if (key in _UNLIKE and value) or unlike:
            raise UserError(f"LoRA {path}: was trained with {key}={value!r}, which is not supported")
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if key == "lora_alpha" and not number:
            raise UserError(f"LoRA {path}: its lora_alpha is {value!r}; expected a number")
