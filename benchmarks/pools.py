"""Pairs of the easy stage beside PyTorch's, with diffusers and transformers, doing the same work.

python -m benchmarks.pools [--base FOLDER] [--scorer FOLDER] [--size 64x64] [--pool 4] [--batch 8] [--batches 4]
    [--steps 50] [--guidance 5] [--rounds 5]

`pool` images of each prompt are drawn, decoded and scored; the latents of the best and the worst are kept. float32 on
this machine's processor, DPM-Solver++, `batch` images at a time, `batches` of them in a round. The folders are those of
the embedded models unless given; `benchmarks.training_step` writes one of SD1.5's size. A process each, rounds
alternately; compilation does not count. JSON to stdout.
"""

import argparse
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path

CORES = os.cpu_count() or 1
os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count={min(CORES, 4)}")  # as in launch/setup.sh

import torch  # noqa: E402
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline  # noqa: E402
from transformers import CLIPModel  # noqa: E402

from benchmarks import peers  # noqa: E402
from hgdpo_jax import config as configuration  # noqa: E402
from hgdpo_jax.config import ASSETS  # noqa: E402
from hgdpo_jax.curriculum.winners import Finish, Group, Pool  # noqa: E402
from hgdpo_jax.data.photographs import Photograph  # noqa: E402
from hgdpo_jax.devices.mesh import local_mesh  # noqa: E402
from hgdpo_jax.devices.sharding import parameter_placer  # noqa: E402
from hgdpo_jax.devices.start import start  # noqa: E402
from hgdpo_jax.devices.transfer import one_ahead  # noqa: E402
from hgdpo_jax.devices.xla import use_precision  # noqa: E402
from hgdpo_jax.diffusion import pipeline as pipelines  # noqa: E402
from hgdpo_jax.diffusion.sampler import Sampler  # noqa: E402
from hgdpo_jax.run.settings import load_config, validate  # noqa: E402
from hgdpo_jax.scoring.scorers import open_scorers  # noqa: E402

_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's


def groups(given: argparse.Namespace) -> list[list[str]]:
    """The prompts of each batch."""
    count = given.batch // given.pool
    return [
        [f"a portrait photograph of a woman, number {i * count + j}" for j in range(count)]
        for i in range(given.batches)
    ]


def ours(given: argparse.Namespace) -> Callable[[], None]:
    """A round, as `hgdpo_jax.curriculum.build` does it."""
    config = load_config("configs/stage1.py:portraits")
    config.model.base, config.data.resolutions, config.pairs.scorer = given.base, (given.size,), given.scorer
    config.pairs.update(sampler="dpmpp_2m", steps=given.steps, guidance=given.guidance)
    config.pairs.update(batch=given.batch, pool_size=given.pool)
    validate(config)
    start()
    use_precision("float32")
    (resolution,), mesh = configuration.resolutions(config).values(), local_mesh()
    pipeline, scorers = (
        pipelines.load_pipeline(given.base, place=parameter_placer(mesh)),
        open_scorers(given.scorer, mesh),
    )
    sampler = Sampler.from_config(pipeline, mesh, config.pairs, config.seed)

    pool = Pool(config.pairs, sampler, scorers)

    def begin(prompts: list[str]) -> Finish:
        photographs = [Photograph(prompt, Path(), prompt) for prompt in prompts]
        return pool.begin(Group(photographs, pipeline.tokenize(prompts), resolution))

    def run() -> None:
        records = [record for made in one_ahead(begin, groups(given)) for record in made()]
        assert len(records) == given.batches * given.batch // given.pool

    return run


def theirs(given: argparse.Namespace) -> Callable[[], None]:
    """The same with PyTorch."""
    drawer = StableDiffusionPipeline.from_pretrained(given.base, dtype=torch.float32)
    drawer.scheduler = DPMSolverMultistepScheduler.from_config(drawer.scheduler.config)
    drawer.set_progress_bar_config(disable=True)
    clip, vae = CLIPModel.from_pretrained(given.scorer, dtype=torch.float32).eval(), drawer.vae
    height, width = map(int, given.size.split("x"))
    side = clip.config.vision_config.image_size
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (_MEAN, _STD))

    @torch.inference_mode()
    def run() -> None:
        kept = []
        for prompts in groups(given):
            latents = drawer(
                prompts,
                height=height,
                width=width,
                num_inference_steps=given.steps,
                guidance_scale=given.guidance,
                num_images_per_prompt=given.pool,
                output_type="latent",
            ).images
            pixels = vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1)
            if (height, width) != (side, side):
                pixels = torch.nn.functional.interpolate(pixels, (side, side), mode="bicubic", antialias=True)
            ids = drawer.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
            seen = clip(pixel_values=((pixels + 1) / 2 - mean) / std, input_ids=ids)
            scores = seen.logits_per_image.view(len(prompts), given.pool, len(prompts))
            scores = scores.diagonal(dim1=0, dim2=2).T  # of each image with its own prompt
            pool = latents.view(len(prompts), given.pool, *latents.shape[1:]).half()
            for found, row in zip(pool, scores, strict=True):
                kept.append((found[row.argmax()].numpy(), found[row.argmin()].numpy(), row.numpy()))

    return run


RUNS = {"hgdpo_jax": ours, "diffusers + transformers": theirs}


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the pairs of a pool here and in PyTorch.")
    parser.add_argument("--base", default=str(ASSETS / "portraits" / "base"))
    parser.add_argument("--scorer", default=str(ASSETS / "portraits" / "scorer"))
    parser.add_argument("--size", default="64x64")
    parser.add_argument("--pool", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8, help="a multiple of --pool")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=RUNS, help="is how each of the two is started")
    given = parser.parse_args()
    if given.batch % given.pool:
        parser.error(f"--batch {given.batch}: expects a multiple of --pool {given.pool}")
    if given.only:
        return peers.serve(RUNS[given.only](given))
    seconds = peers.alternately("benchmarks.pools", RUNS, given.rounds)
    images = given.batch * given.batches
    figures = {name: peers.summary((images / s for s in found), 3) for name, found in seconds.items()}
    one, other = (statistics.median(found) for found in seconds.values())
    settings = {name: value for name, value in vars(given).items() if name not in ("base", "scorer", "only")}
    print(
        json.dumps({**settings, "cores": CORES, "images_per_second": figures, "ratio": round(other / one, 3)}, indent=2)
    )


if __name__ == "__main__":
    main()
