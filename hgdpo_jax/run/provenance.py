"""What a result was made from, so that going on with it means the same: settings, and the content of its inputs.

Paths do not count: a checkout, a base or a folder of photographs may move.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from hgdpo_jax.config import SETTINGS
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.settings import get_setting, setting_keys

MadeFrom = Mapping[str, Any]
_RENAMED = {"objective": "train.objective"}  # as a setting was called → its name
_DEFAULTS = {s.key: list(s.default) if isinstance(s.default, tuple) else s.default for s in SETTINGS}


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


class Difference(NamedTuple):
    """A setting or an input, with the value that a result was made with and the one of now."""

    key: str
    was: Any
    now: Any

    def line(self, what: str, remedy: str) -> str:
        """What a command says of it: `what` names the result, `remedy` what to do."""
        if self.key.startswith(content_key("")):
            was, now = (str(value)[:12] for value in (self.was, self.now))  # no text where a file is damaged
            return f"{self.key}=sha256 {now}…: {what} was made with sha256 {was}…; {remedy}"
        return f"config key {self.key}={self.now!r}: {what} was made with {self.was!r}; {remedy}"


def differences(found: MadeFrom, wanted: MadeFrom) -> list[Difference]:
    """Where what a result was made from is not what it would be made from now. A setting that one of them does not
    name, such as one that there was not yet, has its default there."""
    found, wanted = ({_RENAMED.get(key, key): value for key, value in side.items()} for side in (found, wanted))
    keys = {**found, **wanted}
    both = [(key, *(side.get(key, _DEFAULTS.get(key, "nothing")) for side in (found, wanted))) for key in keys]
    return [Difference(*each) for each in both if each[1] != each[2]]


def require_same(found: MadeFrom, wanted: MadeFrom, what: str, remedy: str) -> None:
    """Raises UserError that names the first difference, with both values.

    Args:
        found: what a result was made from.
        wanted: what it would be made from now.
        what: names the result.
        remedy: what to do.
    """
    for difference in differences(found, wanted):
        raise UserError(difference.line(what, remedy))
