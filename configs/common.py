"""What the stages of a variant share."""

import re

from ml_collections import ConfigDict

from hgdpo_jax.config import ASSETS, default
from hgdpo_jax.run.errors import UserError

EMBEDDED = ("portraits", "portraits-flow")
FLOW = ("klein", "portraits-flow")


def base(variant: str) -> ConfigDict:
    """`sd15`: the paper's settings, for a checkpoint and photographs of your own. `sdxl`: the same for SDXL. `klein`:
    the curriculum for FLUX.2-klein-base. `portraits`: the embedded default. `portraits-flow`: the same on the
    embedded flow model."""
    config = default()
    if variant in ("sd15", "sdxl"):
        config.data.resolutions = ("1024x704",)
        config.data.area = "1024x1024" if variant == "sdxl" else "1024x704"  # of data.resolutions=auto
        config.train.checkpointing = "blocks"
    elif variant == "klein":
        config.data.resolutions = ("1024x1024",)
        config.data.area = "1024x1024"
        config.model.dtype = "bfloat16"  # its numbers grow beyond float16's
        config.pairs.sampler = config.evaluate.sampler = "euler"
        config.pairs.guidance = config.evaluate.guidance = 4.0
        config.pairs.batch = config.evaluate.batch = 1  # a picture fills a device, and more do not fit 24 GB
        config.recipe.blocks = "all"  # it has no up blocks
        config.train.checkpointing = "blocks"
        config.train.lora_rank = 32
        config.train.lora_alpha = 32.0
        # What others train flow models with: at 1e-4 they collapse (docs/flow.md).
        config.train.lr = 1e-5
        config.train.beta = 2000.0
        config.train.noise_levels = "logit_normal"
        config.train.noise_shift = 3.0
    elif variant in EMBEDDED:
        config.model.base = str(ASSETS / "portraits" / "base")
        config.model.dtype = "float32"  # everywhere: so small a network gains nothing, and its figures stay comparable
        config.data.photographs = str(ASSETS / "portraits")
        config.data.resolutions = ("96x96",)
        config.data.area = "96x96"
        config.data.mirror = True  # 108 photographs are few
        config.pairs.scorer = str(ASSETS / "portraits" / "scorer")
        config.pairs.pool_size = 4
        # In few steps the ancestral sampler draws smooth pictures, the smoother the more of the steps are its own: a
        # reconstruction, which takes only the last ones, is sharper than a picture drawn from nothing.
        config.pairs.sampler = "ddpm"
        config.pairs.steps = 16
        config.pairs.guidance = 2.0  # without it every third background has another colour than the caption says
        config.pairs.batch = 32
        config.pairs.shard_size = 32
        config.adapter.kind = "face_id"
        config.adapter.weights = str(ASSETS / "portraits" / "ip_adapter.safetensors")
        # All layers of so small a network learn, in a minute a stage, and more of their LoRA is drawn with.
        config.recipe.weight = 0.65
        config.recipe.blocks = "all"
        config.train.lora_modules = ("attention", "feed_forward", "convolutions")
        config.train.batch = 8
        config.train.lr = 3e-4
        config.train.warmup = 10
        config.train.checkpoint_every = 100
        config.train.log_every = 5
        config.train.eval_every = 250
        config.evaluate.scorer = str(ASSETS / "portraits" / "judge")
        config.evaluate.other_scorer = str(ASSETS / "portraits" / "second_judge")
        config.evaluate.images_per_prompt = 4
        config.evaluate.steps = 16
        config.evaluate.guidance = 2.0
        config.evaluate.batch = 32
        scenes = ("blue background, soft light", "brown background, dark light", "white background, bright light")
        if variant == "portraits-flow":
            config.model.base = str(ASSETS / "portraits" / "flow")
            config.pairs.sampler = config.evaluate.sampler = "euler"
            config.adapter.weights = ""
            config.train.lora_modules = ("attention", "feed_forward")
            config.train.noise_levels = "logit_normal"
        config.evaluate.concept_prompts = tuple(f"{{subject}}, {scene}" for scene in scenes)
    else:
        raise UserError(f"config variant {variant}: unknown; choose sd15, sdxl, klein, portraits or portraits-flow")
    return config


def draw_as_hard(config: ConfigDict) -> None:
    """A stage with pairs of its own is drawn with in the blocks in which the hard stage is."""
    if config.recipe.blocks == "paper":
        config.recipe.blocks = "up"


def of_stable_diffusion(variant: str) -> ConfigDict:
    """:func:`base` of a stage that flow models have not. Raises UserError for one of them."""
    if variant in FLOW:
        raise UserError(f"config variant {variant}: of a flow model neither an adapter nor the text encoder is "
                        "trained; choose sd15, sdxl or portraits")  # fmt: skip
    return base(variant)


def with_number(variant: str, example: str) -> tuple[str, str]:
    """`sd15` and `0.5` of `sd15,0.5`. Raises UserError where no number follows the variant."""
    name, _, number = variant.partition(",")
    if not re.fullmatch(r"\d+(\.\d+)?(e\d+)?", number):
        raise UserError(f"config variant {variant}: expects a number after it, such as {name or 'sd15'},{example}")
    return name, number


def with_count(variant: str, example: str, least: int = 1) -> tuple[str, int]:
    """`sd15` and 2 of `sd15,2`. Raises UserError where no whole number from `least` follows the variant."""
    name, _, number = variant.partition(",")
    if not number.isdecimal() or int(number) < least:
        raise UserError(f"config variant {variant}: expects a whole number from {least} after it, such as "
                        f"{name or 'sd15'},{example}")  # fmt: skip
    return name, int(number)


def with_choice(variant: str, *choices: str) -> tuple[str, str]:
    """`sd15` and `hard` of `sd15,hard`. Raises UserError where none of the choices follows the variant."""
    name, _, choice = variant.partition(",")
    if choice not in choices:
        shown = " or ".join(f"{name or 'sd15'},{each}" for each in choices)
        raise UserError(f"config variant {variant}: expects {shown}")
    return name, choice
