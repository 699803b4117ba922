"""Images drawn into a folder: each a function of its prompt, its seed and the settings alone."""

import json
import logging
import math
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

from hgdpo_jax import config as configuration
from hgdpo_jax.devices.mesh import local_mesh
from hgdpo_jax.devices.random import stream_key
from hgdpo_jax.devices.sharding import parameter_placer
from hgdpo_jax.devices.transfer import one_ahead
from hgdpo_jax.devices.xla import dtype_on, use_precision
from hgdpo_jax.diffusion import pipeline as pipelines
from hgdpo_jax.diffusion import recipe
from hgdpo_jax.diffusion.sampler import Sampler
from hgdpo_jax.diffusion.source import open_source
from hgdpo_jax.pictures.read import UnreadableImage, read_image
from hgdpo_jax.pictures.write import contact_sheet, require_finite, to_uint8, write_png
from hgdpo_jax.run import processes
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import as_written, file_hash, is_empty, write_json
from hgdpo_jax.run.folder import (
    BASE_STAGE,
    CURRICULUM,
    PERSONALISE,
    TEXT_ENCODER,
    blocks_of,
    last_stage,
    stage_config,
    stage_folder,
    was_started,
)
from hgdpo_jax.run.progress import Progress
from hgdpo_jax.training.checkpoints import tree_hash
from hgdpo_jax.training.finished import find_base, finished_policy, with_trained_adapter
from hgdpo_jax.training.policy import load_trainable, policy_of

SHEET = 100  # images on a contact sheet


class Generator(NamedTuple):
    """A pipeline with the policies that it draws with, height and width of the images, all of this in words, and the
    features of a concept image, if there is one."""

    pipeline: pipelines.Pipeline
    policies: Sequence[Any]
    resolution: tuple[int, int]
    settings: dict[str, Any]
    concept: Float[np.ndarray, "1 m f"] | None = None


def from_run(
    workdir: Path,
    stage: str | None = None,
    weight: float | None = None,
    blocks: str | None = None,
    text_encoder: bool = True,
    base: str | None = None,
    step: str | None = None,
) -> Generator:
    """A run's stage under HG-DPO's recipe.

    Args:
        workdir: of the run.
        stage: base, easy, normal, hard or a stage's folder; the last one that was started unless given.
        weight: of all LoRA; the recipe's unless given.
        blocks: where the stage's LoRA acts: `all`; `up`, the other blocks being the base's; `up+normal`, the others
            keeping the normal stage's. Unless given, `up` for hard and `all` for others.
        text_encoder: also use the text encoder's LoRA, where it was trained.
        base: where the run's base model is, if it was moved.
        step: of the stage, see :func:`hgdpo_jax.training.finished.finished_policy`.

    Raises:
        UserError: the stage is not finished, the base is another, or what is asked of LoRA does nothing, as the stage
            has none.
    """
    stage = last_stage(workdir) if stage is None else stage_folder(stage)
    drawn = [] if stage in (BASE_STAGE, PERSONALISE) else [stage]  # an adapter acts on the base
    if drawn and text_encoder and stage != TEXT_ENCODER and was_started(workdir, TEXT_ENCODER):
        drawn.append(TEXT_ENCODER)
    configs = {name: stage_config(workdir, name) for name in drawn}
    config = configs[stage] if drawn else stage_config(workdir, last_stage(workdir) if stage == BASE_STAGE else stage)
    content = find_base(workdir, config, base)
    settings: dict[str, Any] = {"model": config.model.base, "base": content, "stage": stage}
    for asked, what in ((weight, "--lora-weight"), (blocks, "--blocks")):
        kinds = ("lora", "text_lora") if what == "--lora-weight" else ("lora",)
        if asked is not None and not any(c.train.params in kinds for c in configs.values()):
            raise UserError(f"{what} {asked}: does nothing, {stage} has no LoRA for it")
    weight = config.recipe.weight if weight is None else weight
    if not drawn:
        config.train.params = "lora"  # a fresh one, which changes nothing
    use_precision(config.model.dtype)
    pipeline = load_trainable(config, local_mesh(), *(configs[name] for name in drawn[1:]))
    used = []
    for name, own in configs.items():
        like = policy_of(pipeline, own)
        policy = finished_policy(workdir, name, like, own, step if name == stage else None)
        if own.train.params == "lora":
            blocks, normal = blocks or blocks_of(own, own.recipe.blocks), None
            if blocks == "up+normal":
                normal = finished_policy(workdir, CURRICULUM["normal"], like, own)
            policy = recipe.as_drawn(policy, blocks, weight, normal)
            settings |= {"LoRA weight": weight, "LoRA blocks": blocks}
        elif own.train.params == "text_lora":
            policy = recipe.weighted(policy, weight)
            settings["text encoder"] = f"LoRA weight {weight} while t >= {recipe.TEXT_FROM}"
        used.append(policy)
    settings["policy"] = [tree_hash(policy) for policy in used]
    return Generator(pipeline, used, next(iter(configuration.resolutions(config).values())), settings)


def from_checkpoint(model: str) -> Generator:
    """A checkpoint as it is, in the dtype of these devices; see :func:`hgdpo_jax.diffusion.source.open_source`."""
    dtype = dtype_on(jax.default_backend())
    if dtype == "float16" and open_source(model).family.overflows:
        dtype = "bfloat16"
    use_precision(dtype)
    pipeline = pipelines.load_pipeline(model, dtype, param_dtype=dtype, place=parameter_placer(local_mesh()))
    size = pipeline.denoiser.config.get("sample_size") or 64  # a number, or height and width
    height, width = (side * pipeline.vae.pixels_per_latent for side in (size if isinstance(size, list) else [size] * 2))
    return Generator(pipeline, [], (height, width), {"model": model, "base": pipelines.base_hash(model)})


def with_concept(source: Generator, concept: Path, adapter: ConfigDict, workdir: Path | None) -> Generator:
    """The source with an IP-Adapter and a concept image.

    Args:
        source: without an adapter.
        concept: a photograph of a person.
        adapter, workdir: see :func:`hgdpo_jax.training.finished.with_trained_adapter`.

    Raises:
        UserError: the photograph cannot be read, or shows no face where `face_id` needs one; no adapter, or one for
            another model.
    """
    image = read_concept(concept)
    pipeline, encoder = with_trained_adapter(source.pipeline, adapter, workdir, local_mesh())
    if encoder is None or pipeline.adapter is None:
        raise UserError("--concept: needs an IP-Adapter; give its .safetensors file with --adapter, or train "
                        "configs/personalise.py in the --workdir")  # fmt: skip
    features, found = encoder(image[None])
    if not found[0]:
        if pipeline.adapter.config["kind"] == "face_id":
            raise UserError(f"--concept {concept}: no face found; give a photograph that shows one")
        logging.warning("--concept %s: no face found; its centre is used", concept)
    settings = {"concept": file_hash(concept), "adapter": tree_hash(nnx.state(pipeline.adapter, nnx.Param))}
    return source._replace(pipeline=pipeline, concept=features, settings=source.settings | settings)


def read_concept(path: Path, side: int = 1024) -> Float[np.ndarray, "H W 3"]:
    """A photograph in [-1, 1], uncut, no larger than `side`. Raises UserError where it cannot be read."""
    try:
        image = read_image(path)
    except UnreadableImage as error:
        raise UserError(f"--concept {path}: cannot be read as an image ({error})") from error
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.asarray(image, np.float32) / 127.5 - 1.0


def require_own(out: Path, settings: dict[str, Any]) -> None:
    """Checks the folder of a run's images, which need not exist. The model is compared by its content, not by its path.

    Raises:
        UserError: it holds anything else.
    """
    mark = out / "settings.json"
    if mark.is_file():
        with as_written(mark, "choose another folder"):
            found, wanted = {**json.loads(mark.read_text())}, json.loads(json.dumps(settings))
        other = [key for key in {**found, **wanted} if key != "model" and found.get(key) != wanted.get(key)]
        if other:
            values = f"{other[0]} {found.get(other[0])!r}, now it is {wanted.get(other[0])!r}"
            raise UserError(f"--out {out}: holds images of another run ({values}); choose another folder")
    elif out.exists() and not (out.is_dir() and is_empty(out)):
        raise UserError(f"--out {out}: holds something else; choose another folder")


def claim(out: Path, settings: dict[str, Any]) -> None:
    """Notes which images are in the folder; with the first of them, so that what is refused before leaves nothing."""
    if not (out / "settings.json").is_file():
        write_json(out / "settings.json", settings, shared=True)


class Settings(NamedTuple):
    """How images are drawn."""

    steps: int  # of the sampler
    guidance: float  # classifier-free; up to 1: none
    per_device: int = 4  # images that a device draws at once
    normalise: bool = False  # latent adaptive normalisation (LAN)
    negative: str = ""  # replaces the empty prompt in guidance
    concept_scale: float = 1.0  # strength of the adapter


def draw(source: Generator, prompts: Sequence[str], seeds: Sequence[int], out: Path, asked: Settings) -> Sampler:
    """Draws each prompt with each seed into `out`, unless the image is there; returns the sampler that drew.

    An image is a function of its prompt, its seed and the settings alone. Each process draws a part of them.
    """
    settings = _in_words(source, asked)
    about = {**settings, "prompts": list(prompts), "seeds": list(seeds)}
    if processes.is_first():
        require_own(out, about)
    processes.barrier()
    most = source.pipeline.positions
    for prompt, count in zip(prompts, source.pipeline.count_tokens(prompts), strict=True):
        if count > most:
            logging.warning("prompt %r has %d tokens: the first %d are used", prompt, count, most)
    work = [(i, seed, out / f"{i:05d}_{seed}.png") for i in range(len(prompts)) for seed in seeds]
    mine = work[jax.process_index() :: jax.process_count()]
    sampler = _sampler(source, asked, len(mine))  # of all images, so that one program draws the remaining ones too
    ids = source.pipeline.tokenize(prompts)
    mine = [item for item in mine if not item[2].is_file()]
    parts = [mine[begin : begin + sampler.batch] for begin in range(0, len(mine), sampler.batch)]

    def begun(part: list[tuple[int, int, Path]]) -> tuple[list[tuple[int, int, Path]], Any, Any]:
        """A part, its latents and its images, which the devices may still be drawing."""
        rows, keys = ids[[i for i, _, _ in part]], [stream_key(seed, "sample") for _, seed, _ in part]
        concept = None if source.concept is None else np.repeat(source.concept, len(part), axis=0)
        latents, images = sampler.candidates(
            rows, jnp.stack(keys), source.resolution, lambda images, _: images, "draw", concept
        )
        return part, latents, images

    def write(images: np.ndarray, part: list[tuple[int, int, Path]]) -> None:
        claim(out, about)
        for image, (i, seed, path) in zip(to_uint8(images), part, strict=True):
            write_png(path, image, {**settings, "prompt": prompts[i], "seed": seed})

    with ThreadPoolExecutor(1) as writer, Progress(total=len(mine), desc="images", unit="image") as bar:
        written = writer.submit(lambda: None)
        for part, latents, drawn in one_ahead(begun, parts):
            images, names = np.asarray(drawn), [f"prompt {prompts[i]!r}, seed {seed}" for i, seed, _ in part]
            require_finite(np.asarray(latents), names)
            require_finite(images, names)
            written.result()  # raises what went wrong there
            written = writer.submit(write, images, part)
            bar.update(len(part))
        written.result()
    processes.barrier()
    if processes.is_first():
        _write_sheets(out, [path for _, _, path in work], len(seeds))
    return sampler


def _in_words(source: Generator, asked: Settings) -> dict[str, Any]:
    """How images are drawn, for who finds them."""
    said = {"sampler": source.pipeline.drawing.sampler, "steps": asked.steps,
            "guidance": asked.guidance, "LAN": asked.normalise,
            "size": "{}x{}".format(*source.resolution)}  # fmt: skip
    said |= source.settings
    if source.concept is not None:
        said["concept scale"] = asked.concept_scale
    if asked.negative:
        said["negative prompt"] = asked.negative
    return said


def _sampler(source: Generator, asked: Settings, count: int) -> Sampler:
    """Draws so many images, or some of them."""
    mesh = local_mesh()
    sampler = Sampler(
        source.pipeline,
        mesh,
        solver=source.pipeline.drawing.sampler,
        steps=asked.steps,
        guidance=asked.guidance,
        batch=mesh.size * min(asked.per_device, math.ceil(max(count, 1) / mesh.size)),
        seed=0,
        negative=asked.negative,
        normalise=asked.normalise,
        concept_scale=asked.concept_scale,
    )
    sampler.use_policies(*source.policies)
    return sampler


def _write_sheets(out: Path, paths: Sequence[Path], seeds: int) -> None:
    """The images side by side, a row for each prompt where it has a few."""
    columns = seeds if 1 < seeds <= 10 else 10
    for number, begin in enumerate(range(0, len(paths), SHEET)):
        write_png(out / f"sheet_{number:03d}.png", contact_sheet(paths[begin : begin + SHEET], columns), {})
