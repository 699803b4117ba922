"""The JSON files of a model folder; a model's config.json, and the check that nothing in it is silently ignored."""

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hgdpo_jax.run.errors import UserError


class ModelConfig(Mapping[str, Any]):
    """A read-only config that hashes by content, so that it can be a static attribute of a module."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._text = json.dumps(dict(values), sort_keys=True)
        self._values = json.loads(self._text)

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(self._text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModelConfig) and self._text == other._text


def check_only(config: Mapping[str, Any], only: Mapping[str, tuple[Any, ...]], model: str) -> None:
    """Raises UserError that names the first config value which this port does not compute."""
    for key, values in only.items():
        if config.get(key, values[0]) not in values:
            raise UserError(f"{model} config {key}={config[key]!r}: not supported, only {values[0]!r} is")


class Json(dict[str, Any]):
    """An object of a JSON file, which knows its path; missing keys are errors that name the file."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.path = path

    def __missing__(self, key: str) -> Any:
        raise UserError(f"{self.path}: has no {key}; expected the file of such a model, as diffusers or transformers "
                        "writes it")  # fmt: skip


def read_json(path: Path) -> Json:
    """A JSON file of a model folder; a later look-up of a missing key raises UserError too.

    Raises:
        UserError: there is no file, or it is not a JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"), object_hook=functools.partial(Json, path))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; expected a model folder as diffusers writes it") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, Json):
        raise UserError(f"{path}: not a JSON object; expected what diffusers or transformers writes")
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def _is_count(value: Any, most: int = 10**6, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_depth(value: Any) -> bool:
    return _is_count(value, 1000)


def _each(allowed: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Whether a value is a list of what is allowed."""
    return lambda value: isinstance(value, list) and 0 < len(value) <= 100 and all(map(allowed, value))


_COUNTS = """addition_time_embed_dim head_dim hidden_size image_size in_channels intermediate_size joint_attention_dim
latent_channels max_position_embeddings norm_num_groups num_attention_heads num_key_value_heads out_channels
projection_class_embeddings_input_dim projection_dim timestep_guidance_channels vocab_size"""
_COUNT, _DEPTH = "a whole number from 1", "a whole number from 1 to 1000"
# Keys, what their values have to be, and that in words; null stands for a key that is left out.
_KINDS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (_COUNTS, _is_count, _COUNT),
    ("num_hidden_layers num_layers num_single_layers", _is_depth, _DEPTH),
    ("axes_dims_rope block_out_channels decoder_block_out_channels", _each(_is_count), f"a list, each {_COUNT}"),
    (
        "attention_head_dim cross_attention_dim patch_size sample_size",
        lambda x: _is_count(x) or _each(_is_count)(x),
        f"{_COUNT}, or a list",
    ),
    ("layers_per_block", lambda x: _is_depth(x) or _each(_is_depth)(x), f"{_DEPTH}, or a list"),
    ("transformer_layers_per_block", lambda x: _is_depth(x) or _each(_is_depth)(x), f"{_DEPTH}, or a list"),
    ("architectures down_block_types up_block_types", _each(lambda x: isinstance(x, str)), "a list of names"),
    ("eos_token_id", lambda x: _is_count(x, least=0), "a whole number from 0"),
    (
        "batch_norm_eps eps layer_norm_eps mlp_ratio norm_eps rms_norm_eps rope_theta scaling_factor",
        lambda x: _is_number(x) and x > 0,
        "a number above 0",
    ),
    ("logit_scale_init_value", _is_number, "a number"),
    ("rope_parameters rope_scaling", lambda x: isinstance(x, dict), "an object"),
    (
        "guidance_embeds use_linear_projection use_post_quant_conv use_quant_conv",
        lambda x: isinstance(x, bool),
        "true or false",
    ),
    ("_class_name hidden_act", lambda x: isinstance(x, str), "a name"),
)
_VALUES = {key: (allowed, words) for keys, allowed, words in _KINDS for key in keys.split()}
_TOWERS = ("text_config", "vision_config", "text_config_dict", "vision_config_dict")


def read_config(folder: Path) -> Json:
    """config.json of a model folder; see :func:`read_json`.

    Raises:
        UserError: also where a value that a model is made of is none that it can have.
    """
    path = folder / "config.json"
    config = read_json(path)
    _require_values(path, config)
    for tower in _TOWERS:
        if not isinstance(config.get(tower), dict | None):
            raise UserError(f"{path}: {tower}={config[tower]!r}; expected an object")
        _require_values(path, config.get(tower) or {})
    return config


def _require_values(path: Path, config: Mapping[str, Any]) -> None:
    for key, value in config.items():
        allowed, words = _VALUES.get(key, (None, ""))
        if allowed and value is not None and not allowed(value):
            raise UserError(f"{path}: {key}={value!r}; expected {words}")
