"""Text → images, from a run or from any Stable Diffusion checkpoint.

python -m hgdpo_jax.sample --workdir W --prompts FILE --out DIR     HG-DPO's recipe with the run's last stage
python -m hgdpo_jax.sample --model DIR_OR_FILE --prompt "…" --out DIR
python -m hgdpo_jax.sample … --concept PHOTOGRAPH                   a person, with an IP-Adapter

DIR gets a PNG for each prompt and seed, its settings inside, and contact sheets. A command that was stopped goes on
where it was when it is run again.
"""

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path

from hgdpo_jax.config import Range, default
from hgdpo_jax.run import command
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.folder import (
    BASE_STAGE,
    BLOCKS,
    PERSONALISE,
    TEXT_ENCODER,
    last_stage,
    local_folder,
    stage_config,
    stage_folder,
)
from hgdpo_jax.run.prompts import read_prompts

_RANGES = {"steps": Range(1), "guidance": Range(0), "batch": Range(1)}
_RANGES |= dict.fromkeys(("lora_weight", "concept_scale"), Range(-math.inf))
# Options that act beside another one only.
_OF_RUN = ("stage", "step", "lora_weight", "blocks", "base", "no_text_encoder", "lan")
_OF_CONCEPT = ("adapter", "image_encoder", "identity", "concept_scale")


def all_seeds(first: Sequence[int], samples: int) -> list[int]:
    """S, S + 1, …, `samples` of them for each S.

    Raises:
        UserError: they overlap, or are no 32-bit numbers.
    """
    if samples < 1:
        raise UserError(f"--samples {samples}: must be positive")
    seeds = [seed + k for seed in first for k in range(samples)]
    twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
    if twice:
        raise UserError(f"--seed {' '.join(map(str, first))}: with --samples {samples} the seeds overlap, {twice[0]} "
                        f"comes twice; leave {samples} between them")  # fmt: skip
    if min(seeds) < 0 or max(seeds) >= 2**32:
        raise UserError(f"--seed {' '.join(map(str, first))}: expects numbers from 0 to {2**32 - samples}")
    return seeds


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not match:
        raise UserError(f"--size {text}: expects HEIGHTxWIDTH in pixels, the height first, like 1024x704 for upright "
                        "pictures")  # fmt: skip
    return int(match[1]), int(match[2])


def parse() -> argparse.Namespace:
    """The command line. Raises UserError for a number out of its range."""
    parser = argparse.ArgumentParser(description="Draws images; the recipe of HG-DPO is the default for a run.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--workdir", type=local_folder, help="folder of a run")
    what.add_argument("--model", help="a diffusers folder, a .safetensors checkpoint, or owner/name@revision")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt", help="what to draw")
    text.add_argument("--prompts", type=Path, help="file with one prompt a line")
    parser.add_argument("--negative", default="", help="what not to draw: it replaces the empty prompt in guidance")
    parser.add_argument("--out", required=True, type=local_folder, help="folder for the images")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="of a prompt's first image, the next has S+1")
    parser.add_argument("--samples", type=int, default=1, help="images for each prompt and --seed")
    parser.add_argument("--steps", type=int, help="of the sampler; 50 unless given, of a distilled model 4")
    parser.add_argument("--guidance", type=float, help="classifier-free; up to 1: none; 5 unless given, of a flow "
                        "model 4, of a distilled one 1")  # fmt: skip
    parser.add_argument("--size", type=_size, help="HEIGHTxWIDTH in pixels, the height first; the run's or the "
                        "checkpoint's unless given")  # fmt: skip
    parser.add_argument("--batch", type=int, default=4, help="images that a device draws at once")
    run = parser.add_argument_group("with --workdir")
    run.add_argument("--stage", type=stage_folder, help="base, easy, normal, hard, or the stage's folder; the last one "
                     "that was trained unless given")  # fmt: skip
    command.add_step(run)
    run.add_argument("--lora-weight", type=float, help="of all LoRA; unless given as the stage was trained with, 0.5 "
                     "as the paper")  # fmt: skip
    run.add_argument("--blocks", choices=BLOCKS, help="where the stage's LoRA acts: up (default for hard; the other "
                     "blocks are the base's), up+normal (they keep the normal stage's), all")  # fmt: skip
    run.add_argument("--base", help="where the run's base model is now, if it was moved")
    run.add_argument("--no-text-encoder", action="store_true", help="leave out the text encoder's LoRA")
    run.add_argument("--lan", action="store_true", help="latent adaptive normalisation: the base's statistics")
    person = parser.add_argument_group("a person")
    person.add_argument("--concept", type=Path, help="photograph of a person who is to be drawn")
    person.add_argument("--adapter", default="", help="IP-Adapter, .safetensors; that of the run unless given")
    person.add_argument("--image-encoder", default="", help="folder of the CLIP vision tower that --adapter reads with")
    person.add_argument("--identity", default="", help="ArcFace ONNX file that a FaceID --adapter reads with")
    person.add_argument("--concept-scale", type=float, help="strength of the adapter; 1 unless given")
    given = parser.parse_args()
    for name, allowed in _RANGES.items():
        value = getattr(given, name)
        if value is not None and value not in allowed:
            expected = f"{allowed}" if allowed.low == -math.inf else f"a number {allowed}"
            raise UserError(f"{_option(name)} {value}: expects {expected}")
    _refuse_idle(given)
    return given


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _is_given(given: argparse.Namespace, name: str) -> bool:
    value = getattr(given, name)
    return not (value is None or value is False or value == "")


def _refuse_idle(given: argparse.Namespace) -> None:
    """Raises UserError for an option that would do nothing."""
    for names, other, reason in (
        (_OF_RUN, "workdir", "a checkpoint is drawn as it is"),
        (_OF_CONCEPT, "concept", "there is no person to draw"),
    ):
        for name in names:
            if _is_given(given, name) and getattr(given, other) is None:
                raise UserError(f"{_option(name)}: does nothing without {_option(other)}; {reason}")
    of_lora = ("lora_weight", "blocks", "no_text_encoder", "lan")
    idle = {BASE_STAGE: ("step", *of_lora), PERSONALISE: of_lora, TEXT_ENCODER: of_lora[2:3]}
    for name in idle.get(given.stage, ()):
        if _is_given(given, name):
            raise UserError(f"{_option(name)}: does nothing with --stage {given.stage}; leave it out")


def main() -> None:
    given = parse()
    prompts = [given.prompt] if given.prompt is not None else read_prompts(given.prompts, "--prompts ")
    seeds = all_seeds(given.seed, given.samples)

    from hgdpo_jax.devices.start import start
    from hgdpo_jax.results import images
    from hgdpo_jax.run.locks import lock_for_all

    start(given.out, vars(given))
    if given.workdir:
        stage, text_encoder = given.stage or last_stage(given.workdir), not given.no_text_encoder
        if stage == PERSONALISE and not given.concept:
            raise UserError(f"--stage {stage}: draws a person; give a photograph with --concept, or another stage")
        source = images.from_run(
            given.workdir, stage, given.lora_weight, given.blocks, text_encoder, given.base, given.step
        )
    else:
        source = images.from_checkpoint(given.model)
    source = source._replace(resolution=given.size or source.resolution)
    if given.concept:
        config = stage_config(given.workdir, last_stage(given.workdir)) if given.workdir else default()
        chosen = {"weights": given.adapter, "image_encoder": given.image_encoder, "identity": given.identity}
        config.adapter.update({name: value for name, value in chosen.items() if value})
        if (given.image_encoder or given.identity) and not config.adapter.weights:
            raise UserError(
                "--image-encoder, --identity: go with --adapter; the run's own reads with what it learnt with"
            )
        source = images.with_concept(source, given.concept, config.adapter, given.workdir)
    scale = 1.0 if given.concept_scale is None else given.concept_scale
    usual = source.pipeline.drawing
    steps = usual.steps if given.steps is None else given.steps
    guidance = usual.guidance if given.guidance is None else given.guidance
    settings = images.Settings(steps, guidance, given.batch, given.lan, given.negative, scale)
    with lock_for_all(given.out):
        images.draw(source, prompts, seeds, given.out, settings)
    print(f"{given.out}: {len(prompts) * len(seeds)} images")


def cli() -> None:
    command.run(main)


if __name__ == "__main__":
    cli()
