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

from hgdpo_jax.config import (
    AUTO,
    NO_STAGE,
    SETTINGS,
    Range,
    Setting,
    default,
    has_finalists,
    has_reference,
    is_auto,
    rank_gaps,
)
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import as_written, shipped
from hgdpo_jax.run.places import places

CONFIGS = shipped("configs")
CURRICULUM = {"easy": "stage1", "normal": "stage2", "hard": "stage3"}  # the paper's name → our folder
_LOWEST_FACTOR = 0.01  # of Prodigy's rate: less is the rate of another optimizer
_RESERVED = {"base", "candidates", "evaluation", *CURRICULUM}  # names that a run has for something else


def config_from_json(values: Mapping[str, Any]) -> ConfigDict:
    """The config that :func:`to_json` wrote; settings that there were not yet have their defaults.

    Raises:
        UserError: a setting has a value that it cannot have.
    """
    values = dict(values)
    if "objective" in values:  # as it was called
        values["train"] = {**values["train"], "objective": values.pop("objective")}
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
    """Reads ``path/to/config.py[:variant[,value]]``, applies ``key=value`` overrides and validates.

    Args:
        spec: path of a config file, with its variant after a colon, and after a comma what a row of a table differs by.
            ``configs/NAME.py`` and ``configs/ablations/NAME.py`` are the package's where the working directory has no
            folder ``configs``.
        overrides: such as ``["train.lr=1e-4", "mesh.fsdp=8"]``.

    Raises:
        UserError: no such file or variant; a file with an error in it; an unknown key (the nearest is named); a value
            of another type or out of range.
    """
    path, _, variant = spec.rpartition(":") if re.search(r":[\w-]+(,[\w.]+)?$", spec) else (spec, "", "")
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


def overridden(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """A copy of a config, such as one that a training kept, with some ``key=value`` in place of its own.

    Raises:
        UserError: as :func:`load_config` does for an override.
    """
    found = config.copy_and_resolve_references()
    for override in overrides:
        _override(found, override)
    for setting in SETTINGS:
        _check(setting, get_setting(found, setting.key))
    return found


def _config_file(path: str) -> Path:
    """The file itself; or the package's own, for configs/NAME.py where there is no folder configs."""
    given, folder = Path(path), Path("configs")
    if given.is_file():
        return given.absolute()
    name = given.relative_to(folder) if given.is_relative_to(folder) else None
    if name is None or not (CONFIGS / name).is_file():
        raise UserError(f"config {path}: no such file; try configs/stage1.py")
    if folder.is_dir():
        raise UserError(f"config {path}: your folder configs has no {name}; copy or give {CONFIGS / name}")
    return CONFIGS / name


def _import(file: Path) -> ModuleType:
    """A config's module. What it imports from `.` and `..` comes from its own folder and the one around that, and never
    from another folder of configs."""
    name = f"hgdpo_jax_configs_{hashlib.sha256(str(file.parent).encode()).hexdigest()[:12]}"
    around, package = ModuleType(name), ModuleType(f"{name}.own")
    around.__path__, package.__path__ = [str(file.parent.parent)], [str(file.parent)]
    sys.modules |= {module.__name__: module for module in (around, package)}
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
    train, pairs, mesh, objective = config.train, config.pairs, config.mesh, config.train.objective
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
        (pairs.loser == "sdrecon" and pairs.winner != "photograph",
         f" pairs.loser=sdrecon: goes with pairs.winner=photograph, not with {pairs.winner}"),
        (pairs.policy != "base" and (pairs.winner == "sdrecon" or pairs.keep_candidates),
         f" pairs.policy={pairs.policy}: goes with neither pairs.winner=sdrecon nor pairs.keep_candidates, where the "
         "base draws"),
        (pairs.bucket > pairs.buckets, f" pairs.bucket={pairs.bucket}: expects at most pairs.buckets={pairs.buckets}"),
        (0 < pairs.bucket <= pairs.buckets and not rank_gaps(pairs.pool_size, pairs.bucket, pairs.buckets),
         f" pairs.bucket={pairs.bucket}: no two of {pairs.pool_size} pictures are so far apart in rank; choose fewer "
         "pairs.buckets or another bucket"),
        (pairs.loser == "none" and pairs.winner != "photograph",
         f" pairs.loser=none: {pairs.winner} is chosen against a loser; expects pool or a stage"),
        ((pairs.loser == "none") != (objective == "sft"),
         f"s train.objective={objective} and pairs.loser={pairs.loser}: sft learns from photographs without losers, "
         "the others from pairs"),
        (objective == "smpo" and pairs.loser == "given" and not train.pairs,
         " train.objective=smpo: needs the scores of pairs, which given ones have not"),
        (train.blocks == "up" and not (train.params == "lora" and train.reference == "start" and has_reference(config)),
         " train.blocks=up: goes with train.params=lora, train.reference=start and an objective with a reference: it "
         "shares the blocks below with the policy"),
        (train.blocks == "up" and train.weight_decay,
         f" train.weight_decay={train.weight_decay}: with train.blocks=up the blocks below would decay, which do not "
         "learn; expects 0"),
        (train.params == "adapter" and objective != "sft", " train.params=adapter: goes with train.objective=sft"),
        (train.optimizer == "adamw8bit" and train.params.endswith("lora"),
         " train.optimizer=adamw8bit: goes with train.params=all or adapter: a LoRA's state is small"),
        (train.optimizer == "prodigy" and train.lr < _LOWEST_FACTOR,
         f" train.lr={train.lr}: with train.optimizer=prodigy it multiplies the rate that is found; expects 1, or from "
         f"{_LOWEST_FACTOR}"),
        *((len(places(config.evaluate[key])) > 1,
           f" evaluate.{key}={config.evaluate[key]}: is one judge; name further scorers in evaluate.scorers")
          for key in ("scorer", "other_scorer")),
        (config.stage in _RESERVED, f" stage={config.stage}: has another meaning in a run; choose another name"),
    ):  # fmt: skip
        if wrong:
            raise UserError(f"config key{message}")
    _require_stages(config)
    _require_less_drawing(config)
    _refuse_idle(config)


def _require_stages(config: ConfigDict) -> None:
    """Raises UserError where a setting that names stages names the config's own, one twice, or one by the paper's
    name."""
    for key in ("train.start", "train.pairs", "pairs.loser", "pairs.policy"):
        value = get_setting(config, key)
        stages = [name.strip() for name in value.split(",")] if key == "train.pairs" else [value]
        for stage in stages:
            if stage in CURRICULUM:
                own = CURRICULUM[stage]
                raise UserError(f"config key {key}={value}: the {stage} stage is called {own} in settings")
            if stages.count(stage) > 1 or (value and not stage):
                raise UserError(f"config key {key}={value}: expects each stage once, with commas between")
        if value == config.stage and not (key == "pairs.loser" and value in NO_STAGE):
            raise UserError(f"config key {key}={value}: is this stage itself; expects another one")


def _require_less_drawing(config: ConfigDict) -> None:
    """Raises UserError where the settings that save drawing do not go together, or save none."""
    pairs, dropped = config.pairs, has_finalists(config)
    early = f"pairs.race={pairs.race}" if pairs.race else f"pairs.draft_steps={pairs.draft_steps}"
    for wrong, message in (
        (bool(pairs.race and pairs.draft_steps),
         f"s pairs.race={pairs.race} and pairs.draft_steps={pairs.draft_steps}: are two ways to do the same; choose "
         "one"),
        (dropped and pairs.draft_steps > 0 and pairs.sampler == "ddpm",
         f" {early}: in other steps ddpm draws other pictures from the same noise; goes with pairs.sampler=dpmpp_2m or "
         "ddim"),
        (dropped and pairs.bucket > 0,
         f" pairs.bucket={pairs.bucket}: needs the ranks of the whole pool; goes without {early}"),
        (dropped and pairs.keep_candidates,
         f" pairs.keep_candidates=True: keeps whole pools; goes without {early}"),
        (dropped and 2 * pairs.finalists >= pairs.pool_size,
         f" pairs.finalists={pairs.finalists}: so many of the highest and of the lowest are all of "
         f"pairs.pool_size={pairs.pool_size}; with {early} expects fewer"),
        (pairs.draft_steps >= pairs.steps or round(pairs.race * pairs.steps) >= pairs.steps,
         f" {early}: these are all of pairs.steps={pairs.steps}; expects fewer"),
        (len(pairs.guidance_interval) != 2 or pairs.guidance_interval[0] > pairs.guidance_interval[-1],
         f" pairs.guidance_interval={tuple(pairs.guidance_interval)}: expects two timesteps, the lower one first, like "
         "(200, 900)"),
    ):  # fmt: skip
        if wrong:
            raise UserError(f"config key{message}")


def _refuse_idle(config: ConfigDict) -> None:
    """Raises UserError for a setting that has another value than its default and does nothing beside the others. Not
    for those that all commands of a run are given alike, such as the size of pools and the rank of LoRA."""
    train, pairs, learns_pairs = config.train, config.pairs, config.train.objective != "sft"
    compares, another = has_reference(config), "a train.objective with a reference"
    scored = pairs.loser not in ("none", "given") and not pairs.winner == pairs.loser == "pool"
    redrawn = "sdrecon" in (pairs.winner, pairs.loser)
    acts = {
        "data.pairs": (pairs.winner == "given", "pairs.winner=given"),
        "data.caption_dropout": (not learns_pairs, "train.objective=sft"),
        "data.concept_dropout": (train.params == "adapter", "train.params=adapter"),
        "pairs.strengths": (redrawn, "pairs.winner=sdrecon or pairs.loser=sdrecon"),
        "pairs.redraw": (redrawn, "pairs.winner=sdrecon or pairs.loser=sdrecon"),
        "pairs.keep_if_winner_scores_higher": (scored, "a winner that is chosen beside its loser"),
        "pairs.policy": ("pool" in (pairs.winner, pairs.loser), "pairs.winner=pool or pairs.loser=pool"),
        "pairs.least_gap": (pairs.keep_if_winner_scores_higher, "pairs.keep_if_winner_scores_higher=true"),
        "pairs.bucket": (pairs.winner == pairs.loser == "pool", "pairs.winner=pool and pairs.loser=pool"),
        "pairs.buckets": (pairs.bucket > 0, "pairs.bucket from 1"),
        "pairs.guidance_interval": (pairs.guidance > 1, "pairs.guidance above 1"),
        "pairs.finalists": (bool(pairs.race or pairs.draft_steps), "pairs.race or pairs.draft_steps"),
        "pairs.keep_candidates": (pairs.loser not in ("none", "given"), "candidates that are drawn and scored"),
        "train.objective_weight": (train.objective in ("dspo", "mapo", "smpo"), "train.objective=dspo, mapo or smpo"),
        "train.label_smoothing": (train.objective == "dpo", "train.objective=dpo"),
        "train.safeguard": (learns_pairs, "a train.objective for pairs"),
        "train.sft_weight": (learns_pairs, "a train.objective for pairs"),
        "train.auto_beta": (compares and train.objective != "dspo", f"{another} but dspo"),
        "train.reference": (compares, another),
        "train.reference_cache": (compares, another),
        "train.text_cache": (train.params != "text_lora", "train.params=lora, all or adapter"),
        "train.beta": (compares, another),  # of dspo it is that of margins in the log
        "train.lambda_stat": (compares, another),
        "train.quantize": (train.params.endswith("lora"), "train.params=lora or text_lora"),
        "train.lora_dropout": (train.params.endswith("lora"), "train.params=lora or text_lora"),
        "train.adam": (train.optimizer != "adafactor", "train.optimizer=adamw, adamw8bit or prodigy"),
    }
    usual = default()
    for key, (active, other) in acts.items():
        value = get_setting(config, key)
        if not active and value != get_setting(usual, key):
            raise UserError(f"config key {key}={value}: does nothing here, it goes with {other}; otherwise it stays "
                            f"{get_setting(usual, key)}")  # fmt: skip


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
