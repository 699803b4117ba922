"""What a run is: every setting with its meaning, read once at the start and checked before anything is computed.

A file under ``configs/`` is a Python function ``get_config(variant)`` that starts from :func:`default` and reads as
its stage's paragraph of the paper. Settings are overridden on the command line (``--config.train.lr=1e-5``).
"""

import difflib
import hashlib
import importlib.util
import json
import math
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from hgdpo_jax.errors import UserError

ASSETS = Path(__file__).parent / "assets"
CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Range:
    """The finite numbers from `low` to `high`, without an end where it is open; and `also`, a value with a meaning of
    its own."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    also: int | None = None

    def __contains__(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return False
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return (above and below) or value == self.also

    def __str__(self) -> str:
        if self.low == -math.inf:
            text = "a finite number"
        elif self.high == math.inf:
            text = f"above {self.low}" if self.open_low else f"from {self.low}"
        else:
            text = f"from {self.low} to {'below ' * self.open_high}{self.high}"
        return text if self.also is None else f"{text}, or {self.also}"


@dataclass(frozen=True)
class OneOf:
    """One of some names."""

    names: tuple[str, ...]

    def __contains__(self, value: Any) -> bool:
        return value in self.names

    def __str__(self) -> str:
        return f"one of {', '.join(self.names)}"


@dataclass(frozen=True)
class Text:
    """Text that matches a pattern."""

    pattern: str
    words: str

    def __contains__(self, value: Any) -> bool:
        return isinstance(value, str) and re.fullmatch(self.pattern, value) is not None

    def __str__(self) -> str:
        return self.words


@dataclass(frozen=True)
class Flag:
    """true or false."""

    def __contains__(self, value: Any) -> bool:
        return isinstance(value, bool)

    def __str__(self) -> str:
        return "true or false"


Allowed = Range | OneOf | Text | Flag


class Setting(NamedTuple):
    """A setting: dotted key, default (whose type every value has), what a value, or each of a list, may be, and what
    it means."""

    key: str
    default: Any
    allowed: Allowed
    meaning: str


_COUNT, _SHARE, _NOT_NEGATIVE = Range(1), Range(0, 1), Range(0)
_POSITIVE = Range(0, open_low=True)
_DECAY = Range(0, 1, open_high=True)
_BUCKET = Text(r"(gs://[\w.-]+(/[\w.-]+)+)?", "gs://bucket/folder, or nothing")
_ANY, _FLAG = Text(r"[\s\S]*", "text"), Flag()
_FOLDER = Text(r"(?!\.+$)[^/\\\[\]*?]+", "a name of a folder, without / \\ [ ] * ?")
_RESOLUTION = Text(r"[1-9]\d*x[1-9]\d*", "HEIGHTxWIDTH in pixels, like 1024x704")
_SAMPLER = OneOf(("ddpm", "ddim", "dpmpp_2m"))
_AXIS = Range(1, also=-1)

# With the paper's values where it states them.
SETTINGS = (
    Setting("stage", "", _FOLDER, "folder of the stage inside the workdir: stage0, stage1, …"),
    Setting("seed", 0, Range(0, 2**32 - 1), "of everything random"),
    Setting("objective", "dpo", OneOf(("dpo", "sft")), "dpo: preference pairs; sft: noise prediction on photographs"),
    Setting("model.base", "", _ANY, "ε_base: a diffusers folder, a .safetensors checkpoint, or owner/name@revision"),
    Setting("model.vae", "", _ANY, "folder or .safetensors of a VAE that replaces that of the base"),
    Setting("model.lora", "", _ANY, "a LoRA to go on from, of PEFT, diffusers or kohya: it is merged into the base"),
    Setting("model.dtype", "bfloat16", OneOf(("float32", "tf32", "float16", "bfloat16")),
            "of the computation and of frozen parameters; trained ones stay float32. tf32: float32 whose products have "
            "10 bits"),
    Setting("data.photographs", "", _ANY, "photographs with captions, in one of the forms of docs/files.md"),
    Setting("data.pairs", "", _ANY, "preference pairs that are given, in one of the forms of docs/files.md"),
    Setting("data.heldout", 0.02, Range(0, 1, open_high=True),
            "share of them that is held out where none is marked as that, at least eight"),
    Setting("data.split", "train", OneOf(("base", "train")), "which of them to learn from"),
    Setting("data.resolutions", ("512x512",), _RESOLUTION,
            "height x width; a photograph goes to the one nearest to it in shape; pictures in log and report have the "
            "first"),
    Setting("data.mirror", False, _FLAG, "each photograph's mirror image is a further example"),
    Setting("data.caption_dropout", 0.0, _SHARE,
            "sft: share of captions replaced by the empty one, for guidance"),
    Setting("data.concept_dropout", 0.0, _SHARE, "sft of an adapter: share of concept images replaced by none"),
    Setting("pairs.winner", "pool", OneOf(("pool", "sdrecon", "photograph", "given")),
            "pool: best of it; sdrecon: best of the reconstructions; photograph: itself; given: that of data.pairs"),
    Setting("pairs.strengths", (4, 5, 6, 7), Range(1, 10),
            "sdrecon: timesteps in hundreds the photograph is noised to"),
    Setting("pairs.loser", "pool", OneOf(("pool", "stage1", "stage1/loser", "stage2", "given", "none")),
            "pool: worst of it; stage1, stage2: that stage's winner; stage1/loser: its loser; given: that of "
            "data.pairs; none: sft"),
    Setting("pairs.keep_if_winner_scores_higher", False, _FLAG, "the filter that defines the index set K"),
    Setting("pairs.pool_size", 20, _COUNT, "images per prompt; winner and loser from one pool need 2"),
    Setting("pairs.sampler", "dpmpp_2m", _SAMPLER, "that draws candidates"),
    Setting("pairs.steps", 50, _COUNT, "of the sampler"),
    Setting("pairs.guidance", 5.0, _NOT_NEGATIVE, "classifier-free; up to 1: none"),
    Setting("pairs.negative_prompt", "", _ANY, "takes the place of the empty caption in guidance"),
    Setting("pairs.scorer", "", _ANY, "folder of a CLIPModel such as PickScore v1"),
    Setting("pairs.batch", 16, _COUNT, "images per sampling call, rounded up to the devices"),
    Setting("pairs.shard_size", 256, _COUNT, "prompts per shard"),
    Setting("adapter.kind", "ip_adapter_plus", OneOf(("ip_adapter", "ip_adapter_plus", "face_id")),
            "of IP-Adapter"),
    Setting("adapter.image_encoder", "", _ANY, "folder of the CLIP vision tower that the first two read images with"),
    Setting("adapter.identity", "", _ANY,
            "ArcFace ONNX file for face_id and identity distances; the embedded network unless given"),
    Setting("adapter.weights", "", _ANY, ".safetensors file of a trained one; that of the run unless given"),
    Setting("train.pairs", "", Text(f"|{_FOLDER.pattern}", _FOLDER.words),
            "the stage whose pairs are learnt from; empty: this one"),
    Setting("train.start", "base", _FOLDER, "base, or the stage whose policy this one starts from"),
    Setting("train.reference", "start", OneOf(("start", "base")), "start: the policy it started from; base: ε_base"),
    Setting("train.reference_cache", 0, Range(0, 1000),
            "dpo: draws of noise of each pair, for which the reference's predictions are computed once and kept; 0: "
            "each step draws anew"),
    Setting("train.params", "lora", OneOf(("lora", "text_lora", "all", "adapter")),
            "lora and all: of the UNet; text_lora: of the text encoders; adapter: an IP-Adapter"),
    Setting("train.blocks", "all", OneOf(("all", "up")),
            "of the UNet that learn; up: below them the policy stays the reference, and both are computed as one"),
    Setting("train.lora_rank", 8, _COUNT, "of LoRA"),
    Setting("train.lora_alpha", 8.0, _POSITIVE, "LoRA is scaled by alpha / rank"),
    Setting("train.beta", 5000.0, _POSITIVE, "κ = β/2 multiplies the difference of errors"),
    Setting("train.lambda_stat", 0.0, _NOT_NEGATIVE, "weight of the statistics loss"),
    Setting("train.steps", 20_000, _COUNT, "optimizer steps"),
    Setting("train.batch", 16, _COUNT, "pairs (or photographs) per optimizer step, over all devices"),
    Setting("train.accumulate", 1, _COUNT, "microbatches the batch is split into"),
    Setting("train.lr", 1e-5, _POSITIVE, "learning rate, absolute"),
    Setting("train.optimizer", "adamw", OneOf(("adamw", "adafactor")), "adafactor's state is far smaller"),
    Setting("train.schedule", "constant", OneOf(("constant", "cosine")), "of the rate, after a linear warm-up"),
    Setting("train.warmup", 100, _NOT_NEGATIVE, "optimizer steps"),
    Setting("train.adam", (0.9, 0.999), _DECAY, "decay of AdamW's two moments"),
    Setting("train.weight_decay", 0.0, _NOT_NEGATIVE, "decoupled, times the rate"),
    Setting("train.clip_norm", 1.0, _NOT_NEGATIVE, "largest norm of a gradient; 0: no clipping"),
    Setting("train.checkpointing", "none", OneOf(("none", "blocks", "everything")),
            "of gradients: ever less memory, ever more time"),
    Setting("train.ema", 0.0, _DECAY,
            "decay of the averaged policy; 0: none. What is averaged is what the stage hands on"),
    Setting("train.checkpoint_every", 1000, _COUNT, "steps"),
    Setting("train.checkpoints", "", _BUCKET,
            "where policy and reference are kept: a folder of this run alone in a bucket; empty: the workdir"),
    Setting("train.log_every", 50, _COUNT, "steps"),
    Setting("train.eval_every", 1000, _COUNT, "steps between looks at held-out pairs and pictures"),
    Setting("evaluate.scorer", "", _ANY,
            "folder of a second CLIPModel, which chose nothing, as a judge; empty: none"),
    Setting("evaluate.images_per_prompt", 4, _COUNT, "of each held-out caption"),
    Setting("evaluate.sampler", "dpmpp_2m", _SAMPLER, "that draws for log and report"),
    Setting("evaluate.steps", 50, _COUNT, "of the sampler"),
    Setting("evaluate.guidance", 5.0, _NOT_NEGATIVE, "classifier-free; up to 1: none"),
    Setting("evaluate.negative_prompt", "", _ANY, "takes the place of the empty caption in guidance"),
    Setting("evaluate.batch", 16, _COUNT, "images per sampling call, rounded up to the devices"),
    Setting("evaluate.concept_prompts", ("{subject}", "{subject} in a park", "{subject}, black and white"),
            Text(r"[\s\S]+", "text"),
            "for each held-out photograph as concept image; {subject} is its caption up to the first comma"),
    Setting("mesh.data", -1, _AXIS, "devices that split the batch; one -1 takes the devices that are left"),
    Setting("mesh.fsdp", 1, _AXIS, "devices that split batch and weights"),
    Setting("mesh.tensor", 1, _AXIS, "devices that split heads and hidden units"),
)  # fmt: skip


def default() -> ConfigDict:
    """The settings every stage shares, see :data:`SETTINGS`."""
    values: dict[str, Any] = {}
    for setting in SETTINGS:
        group, _, leaf = setting.key.rpartition(".")
        (values.setdefault(group, {}) if group else values)[leaf] = setting.default
    return ConfigDict(values)


def from_json(values: Mapping[str, Any]) -> ConfigDict:
    """The config that :func:`to_json` wrote; settings that there were not yet have their defaults."""
    found = ConfigDict(values)
    for setting in SETTINGS:
        group, _, leaf = setting.key.rpartition(".")
        place = found[group] if group else found
        if leaf not in place:
            place[leaf] = setting.default
    return found


def as_markdown() -> str:
    """The table of the settings for people: docs/settings.md."""
    rows = [
        "# Settings",
        "",
        "`pairs`, `main` and `evaluate` take them as `--config.KEY=VALUE`; lists with commas between (`1,2`), or as",
        'JSON where a value holds a comma itself (`["a, b", "c"]`). Configs change the defaults. Numbers are finite.',
        "",
        "| key | default | allowed | meaning |",
        "|---|---|---|---|",
    ]
    for key, value, allowed, meaning in SETTINGS:
        listed = f"list, each {allowed}" if isinstance(value, tuple) else str(allowed)
        shown = json.dumps(value, ensure_ascii=False) if value != "" else ""
        rows.append("| " + " | ".join(x.replace("|", "\\|") for x in (key, shown, listed, meaning)) + " |")
    return "\n".join(rows) + "\n"


def load(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
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
    file = _find(path)
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
    for override in overrides:
        _override(config, override)
    validate(config)
    config.lock()
    return config


def _find(path: str) -> Path:
    """The file itself; or the one that the package brings, for configs/NAME.py where there is no folder configs."""
    given = Path(path)
    if given.is_file():
        return given.absolute()
    shipped = CONFIGS / given.name
    if given.parent != Path("configs") or not shipped.is_file():
        raise UserError(f"config {path}: no such file; try configs/stage1.py")
    if given.parent.is_dir():
        raise UserError(f"config {path}: your folder configs has no {given.name}; copy or give {shipped}")
    return shipped


def _import(file: Path) -> ModuleType:
    """A config's module. What it imports from `.` lies beside it, so that a folder of configs is never half another."""
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
    old = get(config, key)
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
    (get(config, group) if group else config)[leaf] = new


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


def get(config: ConfigDict, key: str) -> Any:
    """The value at a dotted key. Raises UserError that names the nearest key when there is none."""
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, ConfigDict) or part not in value:
            near = difflib.get_close_matches(key, keys(config), n=1, cutoff=0.0)
            raise UserError(f"config key {key}: unknown; did you mean {near[0]}?")
        value = value[part]
    return value


def keys(config: ConfigDict, prefix: str = "") -> list[str]:
    """All dotted keys of a config, leaves only."""
    found: list[str] = []
    for name, value in config.items():
        found += keys(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else [f"{prefix}{name}"]
    return found


def validate(config: ConfigDict) -> None:
    """Raises UserError for an unknown or missing key, an unknown choice or a value out of range."""
    known, given = keys(default()), keys(config)
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise UserError(f"config key {key}: unknown; did you mean {near[0]}?")
    for key in known:
        if key not in given:
            raise UserError(f"config key {key}: missing; start the config from hgdpo_jax.config.default()")
    for setting in SETTINGS:
        _check(setting, get(config, setting.key))
    train, pairs, mesh = config.train, config.pairs, config.mesh
    if train.batch % train.accumulate:
        raise UserError(f"config key train.accumulate={train.accumulate}: must divide train.batch={train.batch}")
    if len(train.adam) != 2:
        raise UserError(f"config key train.adam={tuple(train.adam)}: expects two numbers, like (0.9, 0.999)")
    if pairs.winner == pairs.loser == "pool" and pairs.pool_size < 2:
        raise UserError(f"config key pairs.pool_size={pairs.pool_size}: winner and loser both come from the pool; "
                        "expects a whole number from 2")  # fmt: skip
    if list(mesh.values()).count(-1) > 1:
        raise UserError(f"config keys mesh={dict(mesh)}: only one of them may be -1")
    if (pairs.winner == "given") != (pairs.loser == "given"):
        raise UserError(f"config keys pairs.winner={pairs.winner} and pairs.loser={pairs.loser}: pairs are given "
                        "whole; expects given for both or for neither")  # fmt: skip
    if pairs.loser == "none" and pairs.winner != "photograph":
        raise UserError(
            f"config key pairs.loser=none: {pairs.winner} is chosen against a loser; expects pool or a stage"
        )
    if (pairs.loser == "none") != (config.objective == "sft"):
        raise UserError(f"config keys objective={config.objective} and pairs.loser={pairs.loser}: sft learns from "
                        "photographs without losers, dpo from pairs")  # fmt: skip
    if train.blocks == "up" and (train.params, train.reference, config.objective) != ("lora", "start", "dpo"):
        raise UserError("config key train.blocks=up: goes with train.params=lora, train.reference=start and "
                        "objective=dpo: policy and reference share the blocks below")  # fmt: skip
    if train.blocks == "up" and train.weight_decay:
        raise UserError(f"config key train.weight_decay={train.weight_decay}: with train.blocks=up the blocks below "
                        "would decay, which do not learn; expects 0")  # fmt: skip
    if train.reference_cache and config.objective != "dpo":
        raise UserError("config key train.reference_cache: goes with objective=dpo; sft has no reference")
    if train.params == "adapter" and config.objective != "sft":
        raise UserError("config key train.params=adapter: goes with objective=sft")


def _check(setting: Setting, value: Any) -> None:
    """Raises UserError for a value of another type, or that is not allowed."""
    listed = isinstance(setting.default, tuple)
    if listed and not isinstance(value, tuple | list):
        raise UserError(f"config key {setting.key}={value!r}: expects a list, like {setting.default!r}")
    if listed and not value:
        raise UserError(f"config key {setting.key}: is empty; expects {setting.allowed}, once or more")
    for part in value if listed else (value,):
        whole = isinstance(setting.default[0] if listed else setting.default, int)
        if part not in setting.allowed or (whole and isinstance(part, float)):
            number = ("a whole number " if whole else "a number ") if isinstance(setting.allowed, Range) else ""
            raise UserError(f"config key {setting.key}={part!r}: expects {number}{setting.allowed}")


def resolutions(config: ConfigDict) -> dict[str, tuple[int, int]]:
    """`data.resolutions` as name → (height, width) in pixels."""
    sizes = ((name, name.split("x")) for name in config.data.resolutions)
    return {name: (int(height), int(width)) for name, (height, width) in sizes}


def to_json(config: ConfigDict) -> dict[str, Any]:
    """A plain dictionary that JSON keeps unchanged (tuples become lists)."""
    return json.loads(json.dumps(config.to_dict()))


def content_hash(config: ConfigDict) -> str:
    """sha256 over the settings, independent of their order."""
    return hashlib.sha256(json.dumps(to_json(config), sort_keys=True).encode()).hexdigest()


if __name__ == "__main__":
    print(as_markdown(), end="")
