"""A config as people give it: read from its file, overridden on the command line and checked before anything runs."""

import difflib
import hashlib
import importlib.util
import json
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from hgdpo_jax.config import AUTO, SETTINGS, Range, Setting, default, is_auto
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import as_written, shipped

CONFIGS = shipped("configs")
CURRICULUM = {"easy": "stage1", "normal": "stage2", "hard": "stage3"}  # the paper's name → our folder
_LOWEST_FACTOR = 0.01  # of Prodigy's rate: less is the rate of another optimizer
_RESERVED = {"base", "evaluation", *CURRICULUM}  # names that a run has for something else


def config_from_json(values: Mapping[str, Any]) -> ConfigDict:
    """The config that :func:`to_json` wrote; settings that there were not yet have their defaults.

    Raises:
        UserError: a setting has a value that it cannot have.
    """
    found = ConfigDict(values)
    for setting in SETTINGS:
        group, _, leaf = setting.key.rpartition(".")
        if group and group not in found:
            found[group] = ConfigDict()
        place = found[group] if group else found
        if leaf not in place:
            place[leaf] = setting.default
        _check(setting, place[leaf])
    return found


def read_config(path: Path) -> ConfigDict:
    """The config that a training kept in its folder; see :func:`config_from_json`. Raises UserError where it is
    damaged."""
    with as_written(path, "put back what the training wrote, or choose another --workdir"):
        try:
            return config_from_json(json.loads(path.read_text()))
        except UserError as error:  # which knows the setting, and not the file
            raise ValueError(error) from error


def load_config(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Reads ``path/to/config.py[:variant]``, applies ``key=value`` overrides and validates.

    Args:
        spec: path of a config file, with its variant after a colon. ``configs/NAME.py`` is one of the package's where
            the working directory has no folder ``configs``.
        overrides: such as ``["train.lr=1e-4", "mesh.fsdp=8"]``.

    Raises:
        UserError: no such file or variant; a file with an error in it; an unknown key (the nearest is named); a value
            of another type or out of range.
    """
    path, _, variant = spec.rpartition(":") if re.search(r":\w+$", spec) else (spec, "", "")
    file = _config_file(path)
    try:
        module = _import(file)
        config = module.get_config(variant) if variant else module.get_config()
    except UserError:
        raise
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        where = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else lines[-1] if lines else None
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"config {file}{f' line {where}' if where else ''}: {reason}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"config {file}: get_config returned no ConfigDict; start it from hgdpo_jax.config.default()")
    area = config.get("data", {}).get("area")
    for override in overrides:
        _override(config, override)
    validate(config)
    if config.data.area != area and not is_auto(config):
        raise UserError(f"config key data.area={config.data.area}: does nothing here, it goes with "
                        f"data.resolutions={AUTO}")  # fmt: skip
    config.lock()
    return config


def _config_file(path: str) -> Path:
    """The file itself; or the package's own, for configs/NAME.py where there is no folder configs."""
    given = Path(path)
    if given.is_file():
        return given.absolute()
    own = CONFIGS / given.name
    if given.parent != Path("configs") or not own.is_file():
        raise UserError(f"config {path}: no such file; try configs/stage1.py")
    if given.parent.is_dir():
        raise UserError(f"config {path}: your folder configs has no {given.name}; copy or give {own}")
    return own


def _import(file: Path) -> ModuleType:
    """A config's module. What it imports from `.` comes from its own folder, never from another folder of configs."""
    package = ModuleType(f"hgdpo_jax_configs_{hashlib.sha256(str(file.parent).encode()).hexdigest()[:12]}")
    package.__path__ = [str(file.parent)]
    sys.modules[package.__name__] = package
    spec = importlib.util.spec_from_file_location(f"{package.__name__}.{file.stem}", file)
    if spec is None or spec.loader is None:
        raise UserError(f"config {file}: is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _override(config: ConfigDict, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"override {override!r}: write --config.key=value")
    old = get_setting(config, key)
    if isinstance(old, ConfigDict):
        raise UserError(f"override {key}: is a group of settings, choose one of {', '.join(sorted(old))}")
    kind = type(old[0]) if isinstance(old, tuple) else type(old)
    try:
        if isinstance(old, tuple):
            new: Any = tuple(_parse(kind, part) for part in _parts(text))
        else:
            new = _parse(kind, text)
    except (ValueError, KeyError) as error:
        expected = f"a list of {kind.__name__}" if isinstance(old, tuple) else kind.__name__
        raise UserError(f"override {key}={text}: expects {expected}, like {old!r}") from error
    group, _, leaf = key.rpartition(".")
    (get_setting(config, group) if group else config)[leaf] = new


def _parts(text: str) -> list[str]:
    """The parts of a list: JSON, or with commas between."""
    try:
        listed = json.loads(text)
    except json.JSONDecodeError:
        listed = text.strip("()[] ").split(",")
    return [str(part).strip() for part in (listed if isinstance(listed, list) else [listed]) if str(part).strip()]


def _parse(kind: type, text: str) -> Any:
    """Raises ValueError or KeyError."""
    if kind is bool:
        return {"true": True, "false": False}[text.lower()]
    return kind(text)


def get_setting(config: ConfigDict, key: str) -> Any:
    """The value at a dotted key. Raises UserError that names the nearest key when there is none."""
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, ConfigDict) or part not in value:
            near = difflib.get_close_matches(key, setting_keys(config), n=1, cutoff=0.0)
            raise UserError(f"config key {key}: unknown; did you mean {near[0]}?")
        value = value[part]
    return value


@contextmanager
def named(key: str, value: object) -> Iterator[None]:
    """A mistake that is found in the block is said to be of this setting."""
    try:
        yield
    except UserError as error:
        if str(error).startswith("config key "):
            raise
        raise UserError(f"config key {key}={value}: {error}") from error


def setting_keys(config: ConfigDict, prefix: str = "") -> list[str]:
    """All dotted keys of a config, leaves only."""
    found: list[str] = []
    for name, value in config.items():
        found += setting_keys(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else [f"{prefix}{name}"]
    return found


def validate(config: ConfigDict) -> None:
    """Raises UserError for an unknown or missing key, an unknown choice or a value out of range."""
    base, given = default(), setting_keys(config)
    for key in given:
        get_setting(base, key)  # raises where it is unknown
    for key in setting_keys(base):
        if key not in given:
            raise UserError(f"config key {key}: missing; start the config from hgdpo_jax.config.default()")
    for setting in SETTINGS:
        _check(setting, get_setting(config, setting.key))
    train, pairs, mesh, objective = config.train, config.pairs, config.mesh, config.objective
    for wrong, message in (
        (AUTO in config.data.resolutions and not is_auto(config),
         f" data.resolutions={','.join(config.data.resolutions)}: {AUTO} stands alone; the run chooses all or none"),
        (train.batch % train.accumulate,
         f" train.accumulate={train.accumulate}: must divide train.batch={train.batch}"),
        (len(train.adam) != 2, f" train.adam={tuple(train.adam)}: expects two numbers, like (0.9, 0.999)"),
        (pairs.winner == pairs.loser == "pool" and pairs.pool_size < 2,
         f" pairs.pool_size={pairs.pool_size}: winner and loser both come from the pool; expects a whole "
         "number from 2"),
        (list(mesh.values()).count(-1) > 1, f"s mesh={dict(mesh)}: only one of them may be -1"),
        ((pairs.winner == "given") != (pairs.loser == "given"),
         f"s pairs.winner={pairs.winner} and pairs.loser={pairs.loser}: pairs are given whole; expects given for both "
         "or for neither"),
        (pairs.loser == "none" and pairs.winner != "photograph",
         f" pairs.loser=none: {pairs.winner} is chosen against a loser; expects pool or a stage"),
        ((pairs.loser == "none") != (objective == "sft"),
         f"s objective={objective} and pairs.loser={pairs.loser}: sft learns from photographs without losers, dpo from "
         "pairs"),
        (train.blocks == "up" and (train.params, train.reference, objective) != ("lora", "start", "dpo"),
         " train.blocks=up: goes with train.params=lora, train.reference=start and objective=dpo: policy and reference "
         "share the blocks below"),
        (train.blocks == "up" and train.weight_decay,
         f" train.weight_decay={train.weight_decay}: with train.blocks=up the blocks below would decay, which do not "
         "learn; expects 0"),
        (train.params == "adapter" and objective != "sft", " train.params=adapter: goes with objective=sft"),
        (train.optimizer == "adamw8bit" and train.params.endswith("lora"),
         " train.optimizer=adamw8bit: goes with train.params=all or adapter: a LoRA's state is small"),
        (train.optimizer == "prodigy" and train.lr < _LOWEST_FACTOR,
         f" train.lr={train.lr}: with train.optimizer=prodigy it multiplies the rate that is found; expects 1, or from "
         f"{_LOWEST_FACTOR}"),
        (config.stage in _RESERVED, f" stage={config.stage}: has another meaning in a run; choose another name"),
    ):  # fmt: skip
        if wrong:
            raise UserError(f"config key{message}")
    for key in ("train.start", "train.pairs"):
        stage = get_setting(config, key)
        if stage in CURRICULUM:
            raise UserError(f"config key {key}={stage}: the {stage} stage is called {CURRICULUM[stage]} in settings")
        if stage == config.stage:
            raise UserError(f"config key {key}={stage}: is this stage itself; expects another one")
    _refuse_idle(config)


def _refuse_idle(config: ConfigDict) -> None:
    """Raises UserError for a setting that has another value than its default and does nothing beside the others. Not
    for those that all commands of a run are given alike, such as the size of pools and the rank of LoRA."""
    train, pairs, dpo = config.train, config.pairs, config.objective == "dpo"
    scored = pairs.loser not in ("none", "given") and not pairs.winner == pairs.loser == "pool"
    acts = {
        "data.pairs": (pairs.winner == "given", "pairs.winner=given"),
        "data.caption_dropout": (not dpo, "objective=sft"),
        "data.concept_dropout": (train.params == "adapter", "train.params=adapter"),
        "pairs.strengths": (pairs.winner == "sdrecon", "pairs.winner=sdrecon"),
        "pairs.keep_if_winner_scores_higher": (scored, "a winner that is chosen beside its loser"),
        "train.reference": (dpo, "objective=dpo"),
        "train.reference_cache": (dpo, "objective=dpo; sft has no reference"),
        "train.beta": (dpo, "objective=dpo"),
        "train.lambda_stat": (dpo, "objective=dpo"),
        "train.quantize": (train.params.endswith("lora"), "train.params=lora or text_lora"),
        "train.lora_dropout": (train.params.endswith("lora"), "train.params=lora or text_lora"),
        "train.adam": (train.optimizer != "adafactor", "train.optimizer=adamw, adamw8bit or prodigy"),
    }
    usual = default()
    for key, (active, other) in acts.items():
        value = get_setting(config, key)
        if not active and value != get_setting(usual, key):
            raise UserError(f"config key {key}={value}: does nothing here, it goes with {other}")


def _check(setting: Setting, value: Any) -> None:
    """Raises UserError for a value of another type, or that is not allowed."""
    listed = isinstance(setting.default, tuple)
    if listed and not isinstance(value, tuple | list):
        raise UserError(f"config key {setting.key}={value!r}: expects a list, like {setting.default!r}")
    if listed and not value:
        raise UserError(f"config key {setting.key}: is empty; expects {setting.allowed}, once or more")
    if listed and setting.key != "train.adam" and len(set(value)) < len(value):
        twice = next(part for i, part in enumerate(value) if part in value[:i])
        raise UserError(f"config key {setting.key}: {twice} stands there twice; expects each once")
    for part in value if listed else (value,):
        whole = isinstance(setting.default[0] if listed else setting.default, int)
        if part not in setting.allowed or (whole and isinstance(part, float)):
            number = ("a whole number " if whole else "a number ") if isinstance(setting.allowed, Range) else ""
            raise UserError(f"config key {setting.key}={part!r}: expects {number}{setting.allowed}")
