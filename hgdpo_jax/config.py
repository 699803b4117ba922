"""Every setting of a run: its meaning, type, range and default.

A file under ``configs/`` is a Python function ``get_config(variant)`` that starts from :func:`default` and reads as
its stage's paragraph of the paper. Settings are overridden on the command line (``--config.train.lr=1e-5``).
"""

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

ASSETS = Path(__file__).parent / "assets"
AUTO = "auto"  # data.resolutions: the first pairs of a run choose them; model.dtype: the devices do


@dataclass(frozen=True)
class Range:
    """The finite numbers from `low` to `high`, without an end that is open; and `also`, which has its own meaning."""

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
class Text:
    """Text that matches a pattern."""

    pattern: str
    words: str

    def __contains__(self, value: Any) -> bool:
        return isinstance(value, str) and re.fullmatch(self.pattern, value) is not None

    def __str__(self) -> str:
        return self.words


def one_of(*names: str) -> Text:
    """One of some names."""
    return Text("|".join(map(re.escape, names)), f"one of {', '.join(names)}")


@dataclass(frozen=True)
class Flag:
    """true or false."""

    def __contains__(self, value: Any) -> bool:
        return isinstance(value, bool)

    def __str__(self) -> str:
        return "true or false"


Allowed = Range | Text | Flag


class Setting(NamedTuple):
    """A setting: dotted key, default (every value has its type), what a value, or each of a list, may be; meaning."""

    key: str
    default: Any
    allowed: Allowed
    meaning: str


_COUNT, _SHARE, _NOT_NEGATIVE = Range(1), Range(0, 1), Range(0)
_POSITIVE = Range(0, open_low=True)
_DECAY = Range(0, 1, open_high=True)
_BUCKET = Text(r"(gs://[\w.-]+(/[\w.-]+)+)?", "gs://bucket/folder, or nothing")
_ANY, _FLAG = Text(r"[\s\S]*", "text"), Flag()
_PREFIX = Text(r"([^\s\ud800-\udfff][^\n\ud800-\udfff]*)?", "text on one line that begins with no blank, or nothing")
_FOLDER = Text(r"(?!\.+$)[^/\\\[\]*?]+", "a name of a folder, without / \\ [ ] * ?")
_SIZE = Text(r"[1-9]\d*x[1-9]\d*", "HEIGHTxWIDTH in pixels, the height first, like 1024x704 for upright pictures")
_RESOLUTION = Text(rf"{AUTO}|{_SIZE.pattern}", f"{_SIZE.words}, or {AUTO}")
_SCORER = "folder of a CLIPModel such as PickScore v1, or NAME=PLACE of another scorer of docs/scorers.md"
_SAMPLER = one_of("ddpm", "ddim", "dpmpp_2m", "euler")
_AXIS = Range(1, also=-1)
NO_STAGE = ("pool", "sdrecon", "given", "none")  # values of pairs.loser, of which any other names a stage
ALWAYS = (0, 1000)  # pairs.guidance_interval: guidance in all steps
CHECKPOINTING = ("none", "blocks", "everything")
PREFERENCE = ("dpo", "hinge", "ipo", "kto", "dspo", "mapo", "smpo")

# With the paper's values where it states them.
SETTINGS = (
    Setting("stage", "", _FOLDER, "folder of the stage inside the workdir: stage0, stage1, …"),
    Setting("seed", 0, Range(0, 2**32 - 1), "of everything random"),
    Setting("model.base", "", _ANY, "ε_base: a diffusers folder, a .safetensors checkpoint, or owner/name@revision"),
    Setting("model.vae", "", _ANY, "folder or .safetensors of a VAE that replaces that of the base"),
    Setting("model.lora", "", _ANY, "a LoRA to go on from, of PEFT, diffusers or kohya: it is merged into the base"),
    Setting("model.dtype", AUTO, one_of(AUTO, "float32", "tf32", "float16", "bfloat16"),
            "of the computation and of frozen parameters; trained ones stay float32. auto: float16 on GPUs, bfloat16 "
            "on TPUs, float32 on processors. tf32: float32 whose products have 10 bits"),
    Setting("data.photographs", "", _ANY, "photographs with captions, in one of the forms of docs/your-data.md"),
    Setting("data.pairs", "", _ANY, "preference pairs that are given, in one of the forms of docs/your-data.md"),
    Setting("data.heldout", 0.02, Range(0, 1, open_high=True),
            "share of the photographs that is held out, at least eight, where none is marked as held out"),
    Setting("data.split", "train", one_of("base", "train"), "which photographs to learn from"),
    Setting("data.resolutions", ("512x512",), _RESOLUTION,
            "each photograph is cut to the one nearest to it in shape; pictures in log and report have the first. "
            "auto, alone: the first pairs of the run choose at most six that suit the photographs"),
    Setting("data.area", "512x512", _SIZE,
            "with data.resolutions=auto: no resolution has more pixels than height times width are"),
    Setting("data.smallest", 0.0, Range(0),
            "a photograph whose height or width is below this many times that of its resolution is left out; 1: none "
            "is enlarged"),
    Setting("data.caption_prefix", "", _PREFIX,
            "put before each caption, held-out ones and those of given pairs too, with a blank between; such as a "
            "trigger word"),
    Setting("data.mirror", False, _FLAG, "each photograph's mirror image is a further example"),
    Setting("data.caption_dropout", 0.0, _SHARE,
            "sft: share of captions replaced by the empty one, for guidance"),
    Setting("data.concept_dropout", 0.0, _SHARE, "sft of an adapter: share of concept images replaced by none"),
    Setting("pairs.winner", "pool", one_of("pool", "sdrecon", "photograph", "given"),
            "pool: best of it; sdrecon: best of the reconstructions; photograph: itself; given: that of data.pairs"),
    Setting("pairs.strengths", (4, 5, 6, 7), Range(1, 10),
            "sdrecon: timesteps in hundreds the photograph is noised to"),
    Setting("pairs.loser", "pool", _FOLDER,
            "pool: worst of it; stage1, stage2, …: that stage's winner; sdrecon: worst of the reconstructions; given: "
            "that of data.pairs; none: sft"),
    Setting("pairs.redraw", "all", one_of("all", "face", "body"),
            "sdrecon: of a photograph that is redrawn; the rest keeps its own latents. One without a face is left out"),
    Setting("pairs.keep_if_winner_scores_higher", False, _FLAG, "the filter that defines the index set K"),
    Setting("pairs.least_gap", 0.0, _NOT_NEGATIVE, "of that filter: so much higher the winner has to score"),
    Setting("pairs.pool_size", 20, _COUNT, "images per prompt; winner and loser from one pool need 2"),
    Setting("pairs.policy", "base", _FOLDER, "that draws the pool: base, or the stage whose it is, as SPIN does"),
    Setting("pairs.bucket", 0, Range(0),
            "Curriculum-DPO: winner and loser are any two of the pool whose ranks are so far apart, 1 the farthest, "
            "pairs.buckets the nearest; 0: best and worst"),
    Setting("pairs.buckets", 5, _COUNT, "of Curriculum-DPO"),
    Setting("pairs.sampler", "dpmpp_2m", _SAMPLER, "that draws candidates; euler: of a flow model"),
    Setting("pairs.steps", 50, _COUNT, "of the sampler"),
    Setting("pairs.guidance", 5.0, _NOT_NEGATIVE, "classifier-free; up to 1: none"),
    Setting("pairs.guidance_interval", ALWAYS, Range(0, 1000),
            "the lowest and the highest timestep with guidance; without it a step is half the work"),
    Setting("pairs.negative_prompt", "", _ANY, "replaces the empty caption in guidance"),
    Setting("pairs.race", 0.0, _DECAY,
            "winner and loser from one pool: after this share of the steps the pictures that are predicted then are "
            "scored, and only the highest and the lowest drawn on; 0: all are. See docs/performance.md"),
    Setting("pairs.draft_steps", 0, Range(0),
            "the same with pictures that are drawn in so few steps: the highest and the lowest are drawn again from "
            "the same noise in pairs.steps; 0: none"),
    Setting("pairs.finalists", 2, _COUNT, "so many of the highest, and of the lowest, go on"),
    Setting("pairs.scorer", "", _ANY,
            f"{_SCORER}; several with commas between choose together, by the mean of their ranks"),
    Setting("pairs.ratings", "", _ANY,
            "file of ratings by hand, from the page of hgdpo_jax.browse: pairs of this stage are dropped or swapped"),
    Setting("pairs.keep_candidates", False, _FLAG,
            "pools and reconstructions are kept in W/candidates with their scores, and read from there by every stage "
            "that needs the same; 32 KiB for each picture of 512x512"),
    Setting("pairs.batch", 16, _COUNT, "images per sampling call, rounded up to the devices"),
    Setting("pairs.shard_size", 256, _COUNT, "prompts per shard"),
    Setting("adapter.kind", "ip_adapter_plus", one_of("ip_adapter", "ip_adapter_plus", "face_id"),
            "of IP-Adapter"),
    Setting("adapter.image_encoder", "", _ANY, "folder of the CLIP vision tower that the first two read images with"),
    Setting("adapter.identity", "", _ANY,
            "ArcFace ONNX file for face_id and identity distances; the embedded network unless given"),
    Setting("adapter.weights", "", _ANY, ".safetensors file of a trained one; that of the run unless given"),
    Setting("train.objective", "dpo", one_of(*PREFERENCE, "sft"),
            "sft: noise prediction on photographs; the others learn from pairs, see docs/objectives.md"),
    Setting("train.objective_weight", 0.0, _NOT_NEGATIVE,
            "β of dspo and mapo, γ of smpo; 0: as published, 0.001, 0.1 and 10"),
    Setting("train.label_smoothing", 0.0, Range(0, 0.5, open_high=True),
            "dpo: share of pairs that are taken to be labelled the wrong way round"),
    Setting("train.safeguard", 0.0, _SHARE,
            "μ of SDPO, such as 0.9: the loser teaches less where its error would grow at the cost of the winner's; "
            "0: none"),
    Setting("train.sft_weight", 0.0, _NOT_NEGATIVE, "of the winner's error, added to the loss of pairs"),
    Setting("train.auto_beta", 0.0, Range(0, 0.5, open_high=True),
            "β changes with each step so that a usual pair has σ(−z) at this value, such as 0.2; 0: it is train.beta"),
    Setting("train.pairs", "", Text(f"|{_FOLDER.pattern}", _FOLDER.words),
            "the stage whose pairs are learnt from, or several with commas between, this one too if it has its own; "
            "empty: this one"),
    Setting("train.start", "base", _FOLDER, "base, or the stage whose policy this one starts from"),
    Setting("train.reference", "start", one_of("start", "base"), "start: the policy it started from; base: ε_base"),
    Setting("train.reference_cache", 0, Range(0, 1000),
            "with a reference: draws of noise for each pair, whose reference predictions are computed once and kept; "
            "0: each step draws anew"),
    Setting("train.text_cache", False, _FLAG,
            "what the text encoders make of each caption is computed once, before the first step, and kept beside the "
            "pairs; they then take no memory of the devices. See docs/performance.md"),
    Setting("train.params", "lora", one_of("lora", "text_lora", "all", "adapter"),
            "lora and all: of the UNet; text_lora: of the text encoders; adapter: an IP-Adapter"),
    Setting("train.blocks", "all", one_of("all", "up"),
            "of the UNet that learn; up: the other blocks stay the reference's and are computed once for both"),
    Setting("train.quantize", "none", one_of("none", "int8"),
            "int8: frozen kernels take 8 bits while a LoRA learns; other commands draw with the whole ones"),
    Setting("train.lora_rank", 8, _COUNT, "of LoRA"),
    Setting("train.lora_alpha", 8.0, _POSITIVE, "LoRA is scaled by alpha / rank"),
    Setting("train.lora_modules", ("attention",), one_of("attention", "feed_forward", "convolutions"),
            "layers that get a LoRA; feed_forward: the rest of the transformer blocks"),
    Setting("train.lora_dropout", 0.0, _DECAY,
            "share of the numbers that each LoRA reads which are replaced by 0 in a step, as in PEFT; 0: none"),
    Setting("train.beta", 5000.0, _POSITIVE, "κ = β/2 multiplies the difference of errors"),
    Setting("train.lambda_stat", 0.0, _NOT_NEGATIVE, "weight of the statistics loss"),
    Setting("train.noise_levels", "uniform", one_of("uniform", "logit_normal"),
            "of a flow model: how σ is drawn in training"),
    Setting("train.noise_shift", 1.0, _POSITIVE,
            "of a flow model: σ becomes shift · σ / (1 + (shift − 1) · σ); above 1 more noise is trained"),
    Setting("train.steps", 20_000, _COUNT, "optimizer steps"),
    Setting("train.batch", 16, _COUNT, "pairs (or photographs) per optimizer step, over all devices"),
    Setting("train.accumulate", 1, _COUNT, "microbatches the batch is split into"),
    Setting("train.lr", 1e-5, _POSITIVE, "learning rate, absolute but for prodigy"),
    Setting("train.optimizer", "adamw", one_of("adamw", "adamw8bit", "adafactor", "prodigy"),
            "adamw8bit: its state in 8 bits, for all and adapter; adafactor's is far smaller; prodigy finds the rate, "
            "which train.lr then multiplies: give 1"),
    Setting("train.schedule", "constant", one_of("constant", "cosine"), "of the rate, after a linear warm-up"),
    Setting("train.warmup", 100, _NOT_NEGATIVE, "optimizer steps"),
    Setting("train.adam", (0.9, 0.999), _DECAY, "decay of the two moments of AdamW and Prodigy"),
    Setting("train.weight_decay", 0.0, _NOT_NEGATIVE, "decoupled, times the rate"),
    Setting("train.clip_norm", 1.0, _NOT_NEGATIVE, "largest norm of a gradient; 0: no clipping"),
    Setting("train.checkpointing", "none", one_of(*CHECKPOINTING),
            "of gradients: ever less memory, ever more time"),
    Setting("train.ema", 0.0, _DECAY,
            "decay of the averaged policy; 0: none. What is averaged is what the stage hands on"),
    Setting("train.checkpoint_every", 1000, _COUNT, "steps"),
    Setting("train.keep", 2, _COUNT,
            "so many of the newest checkpoints stay, and always that with the lowest held-out loss"),
    Setting("train.keep_every", 0, Range(0), "checkpoints at multiples of so many steps stay too; 0: none"),
    Setting("train.hand_on", "latest", one_of("latest", "best"),
            "the checkpoint of a finished stage that later stages and other commands take; best: that with the lowest "
            "held-out loss"),
    Setting("train.checkpoints", "", _BUCKET,
            "where policy and reference are kept: a folder of this run alone in a bucket; empty: the workdir"),
    Setting("train.alarms", 3, Range(0),
            "so many looks in a row that give an alarm (see docs/metrics.md) stop the training; 0: none does"),
    Setting("train.log_every", 50, _COUNT, "steps"),
    Setting("train.prompts", "", _ANY,
            "file with a prompt a line: at each look they are drawn from fixed seeds, beside the base's drawings"),
    Setting("train.wandb", "", Text(r"[^/\\#?%:]{0,128}", "a name without / \\ # ? % :, or nothing"),
            "project of Weights & Biases that the log goes to as well, see docs/metrics.md; empty: none"),
    Setting("train.eval_every", 1000, _COUNT, "steps between evaluations, with held-out pairs and pictures"),
    Setting("recipe.weight", 0.5, _NOT_NEGATIVE, "of LoRA in drawings of evaluate, sample and export"),
    Setting("recipe.blocks", "paper", one_of("paper", "all", "up"),
            "of the UNet in which a stage's LoRA acts there; paper: up for hard, naive and what learns "
            "from their pairs, all for others"),
    Setting("evaluate.scorer", "", _ANY,
            f"a judge that chose no pairs: {_SCORER}; empty: none"),
    Setting("evaluate.other_scorer", "", _ANY,
            "another judge that chose no pairs, against one network's taste; empty: none"),
    Setting("evaluate.scorers", "", _ANY,
            "further scorers, each a column of the results: NAME=PLACE, with commas between; see docs/scorers.md"),
    Setting("evaluate.inception", "", _ANY,
            "for FID and KID: .safetensors file of the Inception network of 2015-12-05; empty: not measured"),
    Setting("evaluate.dinov2", "", _ANY, "for FD-DINOv2: folder of dinov2-large; empty: not measured"),
    Setting("evaluate.cmmd", "", _ANY, "for CMMD: folder of the CLIPModel ViT-L/14@336; empty: not measured"),
    Setting("evaluate.images_per_prompt", 4, _COUNT, "of each held-out caption"),
    Setting("evaluate.sampler", "dpmpp_2m", _SAMPLER, "that draws for log and report; euler: of a flow model"),
    Setting("evaluate.steps", 50, _COUNT, "of the sampler"),
    Setting("evaluate.guidance", 5.0, _NOT_NEGATIVE, "classifier-free; up to 1: none"),
    Setting("evaluate.negative_prompt", "", _ANY, "replaces the empty caption in guidance"),
    Setting("evaluate.batch", 16, _COUNT, "images per sampling call, rounded up to the devices"),
    Setting("evaluate.concept_prompts", ("{subject}", "{subject} in a park", "{subject}, black and white"),
            Text(r"[\s\S]+", "text"),
            "for each held-out photograph as concept image; {subject} is its caption up to the first comma"),
    Setting("mesh.data", -1, _AXIS, "devices that split the batch; one -1 takes the devices that are left"),
    Setting("mesh.fsdp", 1, _AXIS, "devices that split batch and weights"),
    Setting("mesh.tensor", 1, _AXIS, "devices that split heads and hidden units"),
)  # fmt: skip


def default() -> ConfigDict:
    """The defaults of all :data:`SETTINGS`, from which every config starts."""
    values: dict[str, Any] = {}
    for setting in SETTINGS:
        group, _, leaf = setting.key.rpartition(".")
        (values.setdefault(group, {}) if group else values)[leaf] = setting.default
    return ConfigDict(values)


def as_markdown() -> str:
    """The table of the settings for people: docs/settings.md."""
    rows = [
        "# Settings",
        "",
        "`pairs`, `main` and `evaluate` take them as `--config.KEY=VALUE` or from a",
        "[file](run-folder.md#what-a-run-remembers); lists with commas between (`1,2`), or as JSON where a value holds",
        'a comma itself (`["a, b", "c"]`). Configs change the defaults. Numbers are finite.',
        "",
        "| key | default | allowed | meaning |",
        "|---|---|---|---|",
    ]
    for key, value, allowed, meaning in SETTINGS:
        listed = f"list, each {allowed}" if isinstance(value, tuple) else str(allowed)
        shown = json.dumps(value, ensure_ascii=False) if value != "" else ""
        rows.append("| " + " | ".join(x.replace("|", "\\|") for x in (key, shown, listed, meaning)) + " |")
    return "\n".join(rows) + "\n"


def resolutions(config: ConfigDict) -> dict[str, tuple[int, int]]:
    """`data.resolutions` as name → (height, width) in pixels. Where the run chooses them, `data.area`, than which none
    is larger."""
    return {name: _size(name) for name in ([config.data.area] if is_auto(config) else config.data.resolutions)}


def is_auto(config: ConfigDict) -> bool:
    """Whether a config leaves its resolutions to the run; see :mod:`hgdpo_jax.data.resolutions`."""
    return list(config.data.resolutions) == [AUTO]


def has_reference(config: ConfigDict) -> bool:
    """Whether a stage's objective compares the policy with a reference."""
    return config.train.objective not in ("mapo", "sft")


def area(config: ConfigDict) -> tuple[int, int]:
    """`data.area` as (height, width) in pixels."""
    return _size(config.data.area)


def has_finalists(config: ConfigDict) -> bool:
    """Whether most of a pool is dropped before it is drawn to the end."""
    pairs = config.pairs
    return pairs.winner == pairs.loser == "pool" and bool(pairs.race or pairs.draft_steps)


def rank_gaps(count: int, bucket: int, buckets: int) -> list[int]:
    """By how many ranks winner and loser differ in a bucket of Curriculum-DPO (Croitoru et al., 2405.13637): the gap is
    in ((M − 1)(B − k)/B, (M − 1)(B − k + 1)/B].

    Args:
        count: M, of a prompt's candidates.
        bucket: k, from 1, that of the largest gaps.
        buckets: B.
    """
    low, high = ((count - 1) * (buckets - bucket + end) for end in (0, 1))
    return [gap for gap in range(1, count) if low < gap * buckets <= high]


def _size(name: str) -> tuple[int, int]:
    height, width = name.split("x")
    return int(height), int(width)


def to_json(config: ConfigDict) -> dict[str, Any]:
    """A plain dictionary that JSON keeps unchanged (tuples become lists)."""
    return json.loads(json.dumps(config.to_dict()))


def config_hash(config: ConfigDict) -> str:
    """sha256 over the settings, independent of their order."""
    return hashlib.sha256(json.dumps(to_json(config), sort_keys=True).encode()).hexdigest()


if __name__ == "__main__":
    print(as_markdown(), end="")
