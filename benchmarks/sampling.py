"""Images per second: this package against diffusers on one checkpoint, in one process, alternately.

python -m benchmarks.sampling [MODEL] [--batch 8] [--steps 50] [--guidance 5] [--rounds 5]

The same model, scheduler, steps, guidance and batch in float32, from prompts to images. Compilation and a first round
of each are not counted.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

CORES = os.cpu_count() or 1
os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count={min(CORES, 4)}")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler  # noqa: E402

from hgdpo_jax import runtime  # noqa: E402
from hgdpo_jax.config import ASSETS  # noqa: E402
from hgdpo_jax.diffusion import pipeline as pipelines  # noqa: E402
from hgdpo_jax.diffusion.painter import Painter  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description="Times sampling.")
    parser.add_argument("model", nargs="?", default=str(ASSETS / "portraits" / "base"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    prompts = [f"a portrait photograph of a woman, number {i}" for i in range(given.batch)]

    mesh = runtime.local_mesh()
    ours = pipelines.load(given.model)
    side = ours.unet.config["sample_size"] * ours.vae.pixels_per_latent
    painter = Painter(
        ours, mesh, sampler="dpmpp_2m", steps=given.steps, guidance=given.guidance, batch=given.batch, seed=0
    )
    keys = painter.keys("benchmark", prompts, [0] * len(prompts))

    def draw_ours() -> np.ndarray:
        return painter.decode(painter.generate(ours.tokenize(prompts), keys, (side, side), "draw"), "decode")

    theirs = DiffusionPipeline.from_pretrained(given.model, dtype=torch.float32)
    theirs.scheduler = DPMSolverMultistepScheduler.from_config(theirs.scheduler.config)
    theirs.set_progress_bar_config(disable=True)

    def draw_theirs() -> np.ndarray:
        settings = {"num_inference_steps": given.steps, "guidance_scale": given.guidance}
        return theirs(prompts, height=side, width=side, output_type="np", **settings).images

    programs: dict[str, Callable[[], np.ndarray]] = {"hgdpo_jax": draw_ours, "diffusers": draw_theirs}
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for round_ in range(given.rounds + 1):
        for name, program in programs.items():
            begin = time.perf_counter()
            program()
            if round_:
                seconds[name].append(time.perf_counter() - begin)
    print(f"{side}x{side}, batch {given.batch}, {given.steps} steps, guidance {given.guidance}, {CORES} cores")
    for name, found in seconds.items():
        rates = sorted(given.batch / s for s in found)
        median = statistics.median(rates)
        print(f"{name:10} {median:7.2f} images/s   ({rates[0]:.2f} to {rates[-1]:.2f}, {given.rounds} rounds)")


if __name__ == "__main__":
    main()
