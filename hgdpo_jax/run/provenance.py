"""What a result was made from, so that going on with it means the same: settings, and the content of its inputs.

Paths do not count: a checkout, a base or a folder of photographs may move.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.settings import get_setting, setting_keys

MadeFrom = Mapping[str, Any]


def settings(config: ConfigDict, keys: Sequence[str]) -> dict[str, Any]:
    """Dotted key → value as JSON keeps it; the name of a group stands for all its settings."""
    chosen = {}
    for key in keys:
        value = get_setting(config, key)
        for leaf in setting_keys(value, f"{key}.") if isinstance(value, ConfigDict) else [key]:
            value = get_setting(config, leaf)
            chosen[leaf] = list(value) if isinstance(value, tuple) else value
    return chosen


def content_key(name: str) -> str:
    """How the content of an input is called, beside the settings."""
    return f"content of {name}"


def require_same(found: MadeFrom, wanted: MadeFrom, what: str, remedy: str) -> None:
    """Raises UserError that names the first difference, with both values.

    Args:
        found: what a result was made from.
        wanted: what it would be made from now.
        what: names the result.
        remedy: what to do.
    """
    for key in {**found, **wanted}:
        was, now = (side.get(key, "nothing") for side in (found, wanted))
        if was != now:
            name = key if key.startswith(content_key("")) else f"config key {key}"
            was, now = (f"sha256 {x[:12]}…" if name == key else repr(x) for x in (was, now))
            raise UserError(f"{name}={now}: {what} was made with {was}; {remedy}")
