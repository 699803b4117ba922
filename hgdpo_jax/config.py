"""What a run is: every setting with its meaning, read once at the start and checked before anything is computed.

A file under ``configs/`` is a Python function ``get_config(variant)`` that starts from :func:`default` and reads as
its stage's paragraph of the paper. Settings are overridden on the command line (``--config.train.lr=1e-5``).
"""

import difflib
import hashlib
import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from hgdpo_jax.errors import UserError

ASSETS = Path(__file__).parent / "assets"


def default() -> ConfigDict:
    """The settings every stage shares, with the paper's values where it states them."""
    return ConfigDict(
        dict(
            stage="",  # folder of the stage inside the workdir: stage0, stage1, ...
            seed=0,
            objective="dpo",  # dpo: preference pairs; sft: noise prediction on photographs
            model=dict(
                base="",  # ε_base: a diffusers folder, a .safetensors checkpoint, or owner/name@revision of the hub
                vae="",  # folder or .safetensors of a VAE that replaces that of the base
                dtype="bfloat16",  # of the computation and of frozen parameters; trained ones stay float32
            ),
            data=dict(
                photographs="",  # folder with images and captions.jsonl
                split="train",  # which of them to learn from
                resolutions=("512x512",),  # height x width; a photograph goes to the one nearest to it in shape
                mirror=False,  # each photograph's mirror image is a further example
                caption_dropout=0.0,  # sft: share of captions replaced by the empty one, for guidance
                concept_dropout=0.0,  # sft of an adapter: share of concept images replaced by none
            ),
            pairs=dict(
                winner="pool",  # pool: best of it; sdrecon: best of the reconstructions; photograph: itself (sft)
                strengths=(4, 5, 6, 7),  # sdrecon: timesteps in hundreds the photograph is noised to
                loser="pool",  # pool: worst of it; stage1, stage2: that stage's winner; stage1/loser: its loser; none
                keep_if_winner_scores_higher=False,  # the filter that defines the index set K
                pool_size=20,
                sampler="dpmpp_2m",
                steps=50,
                guidance=5.0,
                scorer="",  # folder of a CLIPModel such as PickScore v1
                batch=16,  # images per sampling call
                shard_size=256,  # prompts per shard
            ),
            adapter=dict(
                kind="ip_adapter_plus",  # ip_adapter, ip_adapter_plus, face_id
                image_encoder="",  # folder of the CLIP vision tower that the first two read images with
                identity="",  # ArcFace ONNX file for face_id and identity distances; the embedded network unless given
                weights="",  # .safetensors file of a trained one; that of the run unless given
            ),
            train=dict(
                pairs="",  # the stage whose pairs are learnt from; empty: this one
                start="base",  # base, or the stage whose policy this one starts from
                reference="start",  # start: the policy it started from; base: ε_base
                params="lora",  # lora and all: of the UNet; text_lora: of the text encoders; adapter: an IP-Adapter
                lora_rank=8,
                lora_alpha=8.0,
                beta=5000.0,  # κ = β/2 multiplies the difference of errors
                lambda_stat=0.0,  # weight of the statistics loss
                steps=20_000,
                batch=16,  # pairs (or photographs) per optimizer step, over all devices
                accumulate=1,  # microbatches the batch is split into
                lr=1e-5,
                optimizer="adamw",  # adamw or adafactor, whose state is far smaller
                schedule="constant",  # constant or cosine, both after a linear warm-up
                warmup=100,
                adam=(0.9, 0.999),  # decay of AdamW's two moments
                weight_decay=0.0,
                clip_norm=1.0,
                checkpointing="none",  # of gradients: none, blocks or everything: ever less memory, ever more time
                ema=0.0,  # decay of the averaged policy; 0: none. What is averaged is what the stage hands on
                checkpoint_every=1000,
                log_every=50,
                eval_every=1000,
            ),
            evaluate=dict(
                images_per_prompt=4,
                sampler="dpmpp_2m",
                steps=50,
                guidance=5.0,
                batch=16,
                # For each held-out photograph as concept image; {subject} is its caption up to the first comma.
                concept_prompts=("{subject}", "{subject} in a park", "{subject}, black and white"),
            ),
            mesh=dict(data=-1, fsdp=1, tensor=1),  # devices per axis; one -1 takes what is left
        )
    )


_CHOICES = {
    "objective": ("dpo", "sft"),
    "model.dtype": ("float32", "bfloat16"),
    "data.split": ("base", "train"),
    "pairs.winner": ("pool", "sdrecon", "photograph"),
    "pairs.loser": ("pool", "stage1", "stage1/loser", "stage2", "none"),
    "pairs.sampler": ("ddpm", "ddim", "dpmpp_2m"),
    "evaluate.sampler": ("ddpm", "ddim", "dpmpp_2m"),
    "adapter.kind": ("ip_adapter", "ip_adapter_plus", "face_id"),
    "train.reference": ("start", "base"),
    "train.params": ("lora", "text_lora", "all", "adapter"),
    "train.optimizer": ("adamw", "adafactor"),
    "train.checkpointing": ("none", "blocks", "everything"),
    "train.schedule": ("constant", "cosine"),
}
_POSITIVE = ("train.steps", "train.batch", "train.accumulate", "train.lr", "train.beta", "train.checkpoint_every",
             "train.log_every", "train.eval_every", "pairs.pool_size", "pairs.steps", "pairs.batch",
             "pairs.shard_size", "evaluate.images_per_prompt", "evaluate.steps", "evaluate.batch")  # fmt: skip


def load(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Reads ``path/to/config.py[:variant]``, applies ``key=value`` overrides and validates.

    Args:
        spec: path of a config file, with its variant after a colon.
        overrides: such as ``["train.lr=1e-4", "mesh.fsdp=8"]``; values are parsed as Python literals.

    Raises:
        UserError: no such file or variant; an unknown key (the nearest is named); a value of another type or
            out of range.
    """
    path, _, variant = spec.partition(":")
    if not Path(path).is_file():
        raise UserError(f"config {path}: no such file; try configs/stage1.py")
    module_spec = importlib.util.spec_from_file_location(f"configs.{Path(path).stem}", path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    config = module.get_config(variant) if variant else module.get_config()
    for override in overrides:
        _override(config, override)
    validate(config)
    config.lock()
    return config


def _override(config: ConfigDict, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"override {override!r}: write --config.key=value")
    old = get(config, key)
    if isinstance(old, ConfigDict):
        raise UserError(f"override {key}: is a group of settings, choose one of {', '.join(sorted(old))}")
    try:
        if isinstance(old, str):
            new: Any = text
        elif isinstance(old, bool):
            new = {"true": True, "false": False}[text.lower()]
        elif isinstance(old, tuple):
            new = tuple(type(old[0])(part) for part in text.strip("()[] ").split(",") if part.strip())
        else:
            new = type(old)(text)
    except (ValueError, KeyError) as error:
        raise UserError(f"override {key}={text}: expects {type(old).__name__}, like {old!r}") from error
    group, _, leaf = key.rpartition(".")
    (get(config, group) if group else config)[leaf] = new


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
    for key, choices in _CHOICES.items():
        if get(config, key) not in choices:
            raise UserError(f"config key {key}={get(config, key)!r}: expects one of {', '.join(choices)}")
    for key in _POSITIVE:
        if not get(config, key) > 0:
            raise UserError(f"config key {key}={get(config, key)!r}: must be positive")
    if config.train.batch % config.train.accumulate:
        raise UserError(
            f"config key train.accumulate={config.train.accumulate}: must divide train.batch={config.train.batch}"
        )
    if (config.pairs.winner == "photograph") != (config.pairs.loser == "none"):
        raise UserError("config keys pairs.winner=photograph and pairs.loser=none: go together")
    if config.train.params == "adapter" and config.objective != "sft":
        raise UserError("config key train.params=adapter: goes with objective=sft")
    resolutions(config)
    if not set(config.pairs.strengths) <= set(range(1, 11)):
        raise UserError(f"config key pairs.strengths={config.pairs.strengths}: expects numbers from 1 to 10")


def resolutions(config: ConfigDict) -> dict[str, tuple[int, int]]:
    """`data.resolutions` as name → (height, width) in pixels. Pictures for the log and the report have the first.

    Raises:
        UserError: there is none, or one is not written as HEIGHTxWIDTH.
    """
    found = {}
    for name in config.data.resolutions:
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name)
        if not match:
            raise UserError(f"config key data.resolutions={name!r}: expects HEIGHTxWIDTH in pixels, like 1024x704")
        found[name] = (int(match[1]), int(match[2]))
    if not found:
        raise UserError("config key data.resolutions: is empty; expects HEIGHTxWIDTH in pixels, like 1024x704")
    return found


def to_json(config: ConfigDict) -> dict[str, Any]:
    """A plain dictionary that JSON keeps unchanged (tuples become lists)."""
    return json.loads(json.dumps(config.to_dict()))


def content_hash(config: ConfigDict) -> str:
    """sha256 over the settings, independent of their order."""
    return hashlib.sha256(json.dumps(to_json(config), sort_keys=True).encode()).hexdigest()
