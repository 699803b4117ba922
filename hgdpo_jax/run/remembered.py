"""What a run is made of, in W/run.json: later commands of the run take it from there.

Only what was said on the command line or in a file of settings is remembered, and only once a command has done its work
or was stopped on the way. What a command line says comes before what is remembered; where the two do not fit together,
what was made before refuses (:mod:`hgdpo_jax.run.provenance`).
"""

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from hgdpo_jax.config import AUTO
from hgdpo_jax.run.errors import Stopped, UserError
from hgdpo_jax.run.files import as_written, write_json
from hgdpo_jax.run.places import SCORERS, absolute
from hgdpo_jax.run.settings import get_setting

FILE = "run.json"
# The same for all stages of a run. How pairs are drawn and how a stage is trained is its config's business.
KEYS = (
    "seed", "model.base", "model.vae", "model.lora", "model.dtype", "data.photographs", "data.caption_prefix",
    "data.heldout", "data.resolutions", "data.area", "data.smallest", "pairs.scorer", "pairs.batch", "adapter.kind",
    "adapter.image_encoder", "adapter.identity", "adapter.weights", "evaluate.scorer", "evaluate.other_scorer",
    "evaluate.scorers", "evaluate.inception", "evaluate.dinov2", "evaluate.cmmd", "evaluate.images_per_prompt",
    "evaluate.batch", "evaluate.negative_prompt",
)  # fmt: skip


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _overrides(values: Mapping[str, Any]) -> list[str]:
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in _flat(values)]


def read_settings(path: Path) -> list[str]:
    """`key=value` of each setting in a file of settings: TOML or JSON, each group of settings a table.

    Raises:
        UserError: there is none, or it is neither.
    """
    if path.suffix not in (".toml", ".json"):
        raise UserError(f"--settings {path}: expects a .toml or .json file")
    try:
        text = path.read_text()
        values = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except FileNotFoundError as error:
        raise UserError(f"--settings {path}: no such file") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"--settings {path}: cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise UserError(f"--settings {path}: expects tables of settings, such as [data] with photographs = …")
    return _overrides(values)


def remembered(workdir: Path, given: Sequence[str] = ()) -> list[str]:
    """`key=value` of what a run remembers; nothing before its first command. Raises UserError where it is damaged.

    Args:
        workdir: of the run.
        given: `key=value` of what replaces it. Resolutions also replace the area that they would be chosen by.
    """
    path = workdir / FILE
    with as_written(path, "remove it, and give the run's settings once more"):
        try:
            found = _overrides(json.loads(path.read_text()))
        except FileNotFoundError:
            return []
        if not all(line.partition("=")[0] in KEYS for line in found):
            raise ValueError("holds other settings")
    chosen = any(line.startswith("data.resolutions=") and line != f"data.resolutions={AUTO}" for line in given)
    return [line for line in found if not (chosen and line.startswith("data.area="))]


@contextmanager
def remembering(workdir: Path, config: ConfigDict, given: Sequence[str], writes: bool) -> Iterator[None]:
    """Once the block has ended, or was stopped by a signal, W/run.json holds what was given, and what it held before.

    Args:
        workdir: of the run.
        config: with all that was given and remembered.
        given: keys of settings that were given or remembered.
        writes: whether this process is the one that writes.
    """
    try:
        yield
    except Stopped:
        _write(workdir, config, given, writes)
        raise
    _write(workdir, config, given, writes)


def _write(workdir: Path, config: ConfigDict, given: Sequence[str], writes: bool) -> None:
    values: dict[str, Any] = {}
    for key in KEYS:
        if key in given:
            group, _, leaf = key.rpartition(".")
            value = get_setting(config, key)
            if key in SCORERS:
                value = absolute(value)
            elif isinstance(value, str) and value and Path(value).exists():
                value = str(Path(value).absolute())  # later commands may run in another folder
            (values.setdefault(group, {}) if group else values)[leaf] = value
    if writes and values:
        write_json(workdir / FILE, values)
