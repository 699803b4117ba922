"""A model's parsed config.json, and the check that nothing in it is silently ignored."""

import json
from collections.abc import Iterator, Mapping
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
