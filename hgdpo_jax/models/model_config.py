"""The JSON files of a model folder; a model's config.json, and the check that nothing in it is silently ignored."""

import functools
import json
from collections.abc import Iterator, Mapping
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


class _Json(dict[str, Any]):
    """An object of a JSON file, whose missing keys are errors that name the file."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self._path = path

    def __missing__(self, key: str) -> Any:
        raise UserError(f"{self._path}: has no {key}; expected the file of such a model, as diffusers or transformers "
                        "writes it")  # fmt: skip


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a model folder; a later look-up of a missing key raises UserError too.

    Raises:
        UserError: there is no file, or it is not a JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"), object_hook=functools.partial(_Json, path))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; expected a model folder as diffusers writes it") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a JSON object; expected what diffusers or transformers writes")
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder; see :func:`read_json`."""
    return read_json(folder / "config.json")
