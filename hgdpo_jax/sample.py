"""Text → images, from a run or from any Stable Diffusion checkpoint.

python -m hgdpo_jax.sample --workdir W --prompts FILE --out DIR     HG-DPO's recipe with the run's last stage
python -m hgdpo_jax.sample --model DIR_OR_FILE --prompt "…" --out DIR
python -m hgdpo_jax.sample … --concept PHOTOGRAPH                   a person, with an IP-Adapter

DIR gets a PNG for each prompt and seed, its settings inside, and contact sheets. A command that was stopped goes on
where it was when it is run again.
"""

import argparse
import json
import logging
import math
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float
from ml_collections import ConfigDict
from PIL import Image
from tqdm import tqdm

from hgdpo_jax import command, files, processes, runtime
from hgdpo_jax import config as configuration
from hgdpo_jax.config import Range
from hgdpo_jax.diffusion import pipeline as pipelines
from hgdpo_jax.diffusion import recipe
from hgdpo_jax.diffusion.painter import Painter
from hgdpo_jax.errors import UserError
from hgdpo_jax.files import file_hash, read_lines, write_json
from hgdpo_jax.images import UnreadableImage, read_image
from hgdpo_jax.scoring.pictures import contact_sheet, to_uint8, write_png
from hgdpo_jax.training import policy as policies
from hgdpo_jax.training.checkpoints import tree_hash

SAMPLER, SHEET = "dpmpp_2m", 100  # images on a contact sheet
STAGES = {"base": None, policies.GIVEN: policies.GIVEN, **policies.CURRICULUM}
BLOCKS = ("all", "up", "up+normal")


class Source(NamedTuple):
    """What draws: a pipeline, the policies it draws with, height and width, the features [1 m f] of a concept image if
    there is one, and all of it in words."""

    pipeline: pipelines.Pipeline
    policies: Sequence[Any]
    resolution: tuple[int, int]
    settings: dict[str, Any]
    concept: np.ndarray | None = None


def from_run(
    workdir: Path, stage: str | None, weight: float, blocks: str | None, text_encoder: bool, base: str | None = None
) -> Source:
    """A run's stage under HG-DPO's recipe.

    Args:
        workdir: of the run.
        stage: base, easy, normal or hard; the last one that was started unless given.
        weight: of all LoRA.
        blocks: where the stage's LoRA acts: `all`; `up`, the other blocks being the base's; `up+normal`, the others
            keeping the normal stage's. Unless given, `up` for hard and `all` for others.
        text_encoder: also use the text encoder's LoRA, where it was trained.
        base: where the run's base model is, if it was moved.

    Raises:
        UserError: the stage is not finished, the base is another, or the stage trained all parameters where LoRA is
            asked for.
    """
    folder = policies.last_stage(workdir) if stage is None else STAGES[stage]
    config = policies.stage_config(workdir, folder or policies.last_stage(workdir))
    content = policies.find_base(workdir, config, base)
    settings: dict[str, Any] = {"model": config.model.base, "base": content, "stage": folder or "base"}
    text = policies.TEXT_ENCODER
    with_text = text_encoder and folder is not None and (workdir / text / "config.json").is_file()
    text_config = [policies.stage_config(workdir, text)] if with_text else []
    mesh = runtime.local_mesh()
    runtime.use_precision(config.model.dtype)
    pipeline = policies.load(config, mesh, *text_config)
    used = []
    if folder is not None:
        like = policies.of(pipeline, config)
        policy = policies.finished(workdir, folder, like, config)
        if config.train.params == "lora":
            blocks = blocks or policies.blocks_of(folder)
            normal = None
            if blocks == "up+normal":
                normal = policies.finished(workdir, policies.CURRICULUM["normal"], like, config)
            policy = recipe.as_drawn(policy, blocks, weight, normal)
            settings |= {"LoRA weight": weight, "LoRA blocks": blocks}
        elif blocks:
            raise UserError(f"--blocks {blocks}: {folder} trained all parameters, it has no LoRA")
        used.append(policy)
    for found in text_config:
        used.append(recipe.weighted(policies.finished(workdir, text, policies.of(pipeline, found), found), weight))
        settings["text encoder"] = f"LoRA weight {weight} while t >= {recipe.TEXT_FROM}"
    settings["policy"] = [tree_hash(policy) for policy in used]
    return Source(pipeline, used, next(iter(configuration.resolutions(config).values())), settings)


def from_checkpoint(model: str) -> Source:
    """A checkpoint as it is, in bfloat16 on accelerators; see `pipeline.find` for what it may be."""
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    runtime.use_precision(dtype)
    pipeline = pipelines.load(model, dtype, param_dtype=dtype, place=runtime.placer(runtime.local_mesh()))
    size = pipeline.unet.config.get("sample_size", 64)  # a number, or height and width
    height, width = (side * pipeline.vae.pixels_per_latent for side in (size if isinstance(size, list) else [size] * 2))
    return Source(pipeline, [], (height, width), {"model": model, "base": pipelines.content_hash(model)})


def with_concept(source: Source, concept: Path, adapter: ConfigDict, workdir: Path | None) -> Source:
    """The source with an IP-Adapter and a concept image.

    Args:
        source: without.
        concept: a photograph of a person.
        adapter, workdir: see `training.policy.with_trained_adapter`.

    Raises:
        UserError: the photograph cannot be read, or shows no face where `face_id` needs one; no adapter, or one for
            another model.
    """
    image = load_whole(concept)
    pipeline, encoder = policies.with_trained_adapter(source.pipeline, adapter, workdir, runtime.local_mesh())
    if encoder is None:
        raise UserError("--concept: needs an IP-Adapter; give its .safetensors file with --adapter, or train "
                        "configs/personalise.py in the --workdir")  # fmt: skip
    features, found = encoder(image[None])
    if not found[0]:
        if pipeline.adapter.config["kind"] == "face_id":
            raise UserError(f"--concept {concept}: no face found; give a photograph that shows one")
        logging.warning("--concept %s: no face found; its centre is used", concept)
    settings = {"concept": file_hash(concept), "adapter": tree_hash(nnx.state(pipeline.adapter, nnx.Param))}
    return source._replace(pipeline=pipeline, concept=features, settings=source.settings | settings)


def load_whole(path: Path, side: int = 1024) -> Float[np.ndarray, "H W 3"]:
    """A photograph in [-1, 1], uncut, no larger than `side`. Raises UserError where it cannot be read."""
    try:
        image = read_image(path)
    except UnreadableImage as error:
        raise UserError(f"--concept {path}: cannot be read as an image ({error})") from error
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.asarray(image, np.float32) / 127.5 - 1.0


def read_prompts(path: Path) -> list[str]:
    """One prompt a line; empty lines are passed over.

    Raises:
        UserError: no such file, not UTF-8, no prompt in it, or one that stands there twice: the same seeds would draw
            it twice.
    """
    if not path.is_file():
        raise UserError(f"--prompts {path}: no such file")
    seen: dict[str, int] = {}
    for number, prompt in read_lines(path):
        if prompt in seen:
            raise UserError(f"{path} line {number}: repeats line {seen[prompt]}, the same seeds would draw it twice; "
                            "remove it, or draw more with --samples")  # fmt: skip
        seen[prompt] = number
    if not seen:
        raise UserError(f"--prompts {path}: is empty; expects one prompt a line")
    return list(seen)


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


def claim(out: Path, settings: dict[str, Any]) -> None:
    """Makes the folder of a run's images, or finds it again. The model counts by its content, not by its place.

    Raises:
        UserError: it holds anything else.
    """
    mark = out / "settings.json"
    if mark.is_file():
        found, wanted = json.loads(mark.read_text()), json.loads(json.dumps(settings))
        other = [key for key in {**found, **wanted} if key != "model" and found.get(key) != wanted.get(key)]
        if other:
            values = f"{other[0]} {found.get(other[0])!r}, now it is {wanted.get(other[0])!r}"
            raise UserError(f"--out {out}: holds images of another run ({values}); choose another folder")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: holds something else; choose another folder")
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_json(mark, settings)


def draw(
    source: Source,
    prompts: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    *,
    steps: int,
    guidance: float,
    per_device: int,
    normalise: bool,
    negative: str = "",
    concept_scale: float = 1.0,
) -> Painter:
    """Draws each prompt with each seed into `out`, what is not there yet; returns what drew.

    An image is a function of its prompt, its seed and the settings alone. Each process draws a part of them.
    """
    settings = {"sampler": SAMPLER, "steps": steps, "guidance": guidance, "LAN": normalise,
                "size": "{}x{}".format(*source.resolution), **source.settings}  # fmt: skip
    if source.concept is not None:
        settings["concept scale"] = concept_scale
    if negative:
        settings["negative prompt"] = negative
    if processes.first_process():
        claim(out, {**settings, "prompts": list(prompts), "seeds": list(seeds)})
    processes.together()
    for prompt, count in zip(prompts, source.pipeline.count_tokens(prompts), strict=True):
        if count > pipelines.POSITIONS:
            logging.warning("prompt %r has %d tokens: the first %d are used", prompt, count, pipelines.POSITIONS)
    work = [(i, seed, out / f"{i:05d}_{seed}.png") for i in range(len(prompts)) for seed in seeds]
    paths = [path for _, _, path in work]
    mine, mesh = work[jax.process_index() :: jax.process_count()], runtime.local_mesh()
    # Of all images, so that those that are left are drawn by the same program.
    batch = mesh.size * min(per_device, math.ceil(max(len(mine), 1) / mesh.size))
    mine = [item for item in mine if not item[2].is_file()]
    painter = Painter(
        source.pipeline,
        mesh,
        sampler=SAMPLER,
        steps=steps,
        guidance=guidance,
        batch=batch,
        seed=0,
        negative=negative,
        normalise=normalise,
        concept_scale=concept_scale,
    )
    painter.use(*source.policies)
    ids = source.pipeline.tokenize(prompts)

    def begun(part: Sequence[tuple[int, int, Path]]) -> tuple[Sequence[tuple[int, int, Path]], jax.Array]:
        """What the devices draw of it, which is not waited for."""
        rows, keys = ids[[i for i, _, _ in part]], [runtime.stream_key(seed, "sample") for _, seed, _ in part]
        concept = None if source.concept is None else np.repeat(source.concept, len(part), axis=0)
        _, images = painter.candidates(
            rows, jnp.stack(keys), source.resolution, lambda images, _: images, "draw", concept
        )
        return part, images

    def write(images: np.ndarray, part: Sequence[tuple[int, int, Path]]) -> None:
        for image, (i, seed, path) in zip(to_uint8(images), part, strict=True):
            write_png(path, image, {**settings, "prompt": prompts[i], "seed": seed})

    silent = not processes.first_process()
    with ThreadPoolExecutor(1) as writer, tqdm(total=len(mine), desc="images", unit="image", disable=silent) as bar:
        written = None
        parts = [mine[begin : begin + batch] for begin in range(0, len(mine), batch)]
        for part, drawn in runtime.ahead(begun, parts):
            images = np.asarray(drawn)
            if written is not None:
                written.result()  # raises what went wrong there
            written = writer.submit(write, images, part)
            bar.update(len(part))
        if written is not None:
            written.result()
    processes.together()
    if processes.first_process():
        for number, begin in enumerate(range(0, len(paths), SHEET)):
            columns = len(seeds) if 1 < len(seeds) <= 10 else 10
            write_png(out / f"sheet_{number:03d}.png", contact_sheet(paths[begin : begin + SHEET], columns), {})
    return painter


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not match:
        raise UserError(f"--size {text}: expects HEIGHTxWIDTH in pixels, like 1024x704")
    return int(match[1]), int(match[2])


def _check(given: argparse.Namespace) -> None:
    """Raises UserError for a number out of its range."""
    ranges = {"steps": Range(1), "guidance": Range(0), "batch": Range(1)}
    ranges |= {"lora_weight": Range(-math.inf), "concept_scale": Range(-math.inf)}
    for name, allowed in ranges.items():
        if getattr(given, name) not in allowed:
            raise UserError(f"--{name.replace('_', '-')} {getattr(given, name)}: expects {allowed}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws images; the recipe of HG-DPO is the default for a run.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--workdir", type=files.folder, help="folder of a run")
    what.add_argument("--model", help="a diffusers folder, a .safetensors checkpoint, or owner/name@revision")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt", help="what to draw")
    text.add_argument("--prompts", type=Path, help="file with one prompt a line")
    parser.add_argument(
        "--negative", default="", help="what not to draw: takes the place of the empty prompt in guidance"
    )
    parser.add_argument("--out", required=True, type=files.folder, help="folder for the images")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="of a prompt's first image, the next has S+1")
    parser.add_argument("--samples", type=int, default=1, help="images for each prompt and --seed")
    parser.add_argument("--steps", type=int, default=50, help="of DPM-Solver++")
    parser.add_argument("--guidance", type=float, default=5.0, help="classifier-free; up to 1: none")
    parser.add_argument("--size", help="HEIGHTxWIDTH in pixels; the run's or the checkpoint's unless given")
    parser.add_argument("--batch", type=int, default=4, help="images that a device draws at once")
    parser.add_argument(
        "--lan", action="store_true", help="latent adaptive normalisation: the base's channel statistics"
    )
    run = parser.add_argument_group("with --workdir")
    run.add_argument("--stage", choices=STAGES, help="the last one that was trained unless given")
    run.add_argument("--lora-weight", type=float, default=recipe.WEIGHT, help="of all LoRA (%(default)s)")
    run.add_argument("--blocks", choices=BLOCKS, help="where the stage's LoRA acts: up (default for hard; the other "
                     "blocks are the base's), up+normal (they keep the normal stage's), all")  # fmt: skip
    run.add_argument("--base", help="where the run's base model is now, if it was moved")
    run.add_argument("--no-text-encoder", action="store_true", help="leave out the text encoder's LoRA")
    person = parser.add_argument_group("a person")
    person.add_argument("--concept", type=Path, help="photograph of a person who is to be drawn")
    person.add_argument("--adapter", default="", help="IP-Adapter, .safetensors; that of the run unless given")
    person.add_argument("--image-encoder", default="", help="folder of the CLIP vision tower that --adapter reads with")
    person.add_argument("--identity", default="", help="ArcFace ONNX file that a FaceID --adapter reads with")
    person.add_argument("--concept-scale", type=float, default=1.0, help="strength of the adapter (%(default)s)")
    given = parser.parse_args()
    _check(given)
    command.agree(given.out, vars(given))
    prompts = [given.prompt] if given.prompt is not None else read_prompts(given.prompts)
    seeds = all_seeds(given.seed, given.samples)
    if given.workdir:
        text_encoder = not given.no_text_encoder
        source = from_run(given.workdir, given.stage, given.lora_weight, given.blocks, text_encoder, given.base)
    else:
        source = from_checkpoint(given.model)
    source = source._replace(resolution=_size(given.size) if given.size else source.resolution)
    if given.concept:
        config = policies.stage_config(given.workdir, policies.last_stage(given.workdir)) if given.workdir else None
        adapter = (config or configuration.default()).adapter
        chosen = {"weights": given.adapter, "image_encoder": given.image_encoder, "identity": given.identity}
        adapter.update({name: value for name, value in chosen.items() if value})
        source = with_concept(source, given.concept, adapter, given.workdir)
    with runtime.owned(given.out):
        draw(source, prompts, seeds, given.out, steps=given.steps, guidance=given.guidance, per_device=given.batch,
             normalise=given.lan, negative=given.negative, concept_scale=given.concept_scale)  # fmt: skip
    print(f"{given.out}: {len(prompts) * len(seeds)} images")


if __name__ == "__main__":
    command.run(main)
