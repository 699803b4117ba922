"""One real optimizer step of Stable Diffusion 1.5 or XL at full size and 512x512, with its time and peak memory.

python -m benchmarks.training_step sd15|sdxl FOLDER [--dtype bfloat16|float32] [--checkpointing none|blocks|everything]
    [--pairs 1] [--steps 2]

The first call writes random weights of that architecture to FOLDER, as diffusers lays them out: 1.5 in float32, XL in
float16. What is trained is what `configs/stage1.py` says, on pairs of random latents. Programs are kept as those of
the commands are: with `JAX_ENABLE_COMPILATION_CACHE=false` compiling takes what it takes for the first time.

On a processor XLA computes bfloat16 in float32, and by default schedules for speed and keeps the converted weights from
the forward pass to the backward one. It then needs several times the memory; these settings stop both:

    export XLA_FLAGS="--xla_cpu_enable_concurrency_optimized_scheduler=false --xla_disable_hlo_passes=cse"
"""

import argparse
import json
import math
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from transformers import CLIPTokenizer

from benchmarks import peers
from hgdpo_jax.config import ASSETS
from hgdpo_jax.devices.mesh import make_mesh
from hgdpo_jax.devices.processor import keep_memory
from hgdpo_jax.devices.sharding import tree_shardings
from hgdpo_jax.devices.start import start
from hgdpo_jax.devices.transfer import to_devices
from hgdpo_jax.devices.xla import use_precision
from hgdpo_jax.diffusion.pipeline import MODELS
from hgdpo_jax.models.architectures import SD15, SDXL, Architecture
from hgdpo_jax.models.convert import abstract, parameters, to_torch_layout, torch_key
from hgdpo_jax.models.weights import STEMS, write_weights
from hgdpo_jax.run.settings import load_config, validate
from hgdpo_jax.training import step as steps
from hgdpo_jax.training.optimizer import make_optimizer, numbers_of
from hgdpo_jax.training.policy import load_trainable

ARCHITECTURES: Mapping[str, tuple[Architecture, type]] = {"sd15": (SD15, np.float32), "sdxl": (SDXL, np.float16)}
SHOWN = ("loss/total", "loss/statistics", "gradient_norm", "dpo/margin")


def random_weights(part: str, config: Mapping[str, Any], dtype: type) -> dict[str, np.ndarray]:
    """Torch key → random array that keeps the size of what goes through; scales of norms are one."""
    rng, weights = np.random.default_rng(0), {}
    for path, leaf in parameters(abstract(MODELS[part], config)).items():
        value = np.ones(leaf.shape, dtype)
        if path[-1] != "scale":
            value = rng.standard_normal(leaf.shape, np.float32)
            value *= max(1, math.prod(leaf.shape[:-1])) ** -0.5 if leaf.ndim > 1 else 0.0
        weights[torch_key(path)] = to_torch_layout(str(path[-1]), value.astype(dtype))
    return weights


def write_folder(architecture: Architecture, folder: Path, dtype: type) -> None:
    """A diffusers folder with random weights, one model in memory at a time; model_index.json comes last."""
    for part, config in architecture.configs.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / part / "config.json").write_text(json.dumps(dict(config)))
        stem = STEMS[0] if "_diffusers_version" in config else STEMS[1]
        write_weights(folder / part / f"{stem}.safetensors", random_weights(part, config, dtype), dtype)
    for name in ("tokenizer", "tokenizer_2"):
        if name in architecture.index:
            padding = "!" if name == "tokenizer_2" else "<|endoftext|>"
            clip = CLIPTokenizer.from_pretrained(ASSETS / "portraits" / "base" / "tokenizer", pad_token=padding)
            clip.save_pretrained(folder / name)
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(dict(architecture.scheduler)))
    (folder / "model_index.json").write_text(json.dumps(dict(architecture.index)))


def peak() -> float:
    """The most memory this process has held, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def size(*trees: Any) -> float:
    """Bytes of all arrays, in GiB."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(trees)) / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs two optimizer steps at full size.")
    parser.add_argument("model", choices=sorted(ARCHITECTURES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--checkpointing", default="blocks", choices=("none", "blocks", "everything"))
    parser.add_argument("--pairs", type=int, default=1, help="of a step")
    parser.add_argument("--steps", type=int, default=2, help="after the first two of more, their median is stated")
    given = parser.parse_args()
    architecture, stored = ARCHITECTURES[given.model]
    if not (given.folder / "model_index.json").is_file():
        write_folder(architecture, given.folder, stored)
        print(f"{given.folder} written; run again, so that writing it does not count")
        return

    config = load_config(f"configs/stage1.py:{given.model}")
    config.model.base, config.model.dtype = str(given.folder), given.dtype
    config.data.resolutions = ("512x512",)
    config.train.batch, config.train.checkpointing = given.pairs, given.checkpointing
    validate(config)
    start()
    use_precision(given.dtype)
    settings, mesh = config.train, make_mesh(config.mesh)

    # As hgdpo_jax.training does it.
    keep_memory(mesh)
    begin = time.perf_counter()
    pipeline = load_trainable(config, mesh)
    denoiser, policy, frozen = steps.split_params(pipeline, settings.params)
    tx = make_optimizer(settings)
    placed = tree_shardings(jax.eval_shape(lambda p: steps.init_state(p, tx, settings.ema), policy), mesh)
    state = jax.jit(lambda p: steps.init_state(p, tx, settings.ema), out_shardings=placed)(policy)
    step = steps.make_step(steps.preference_loss(denoiser, pipeline.schedule), tx, settings.accumulate, placed)
    numbers = numbers_of(config, 0)
    rng, shape = np.random.default_rng(0), pipeline.latent_shape((512, 512))
    batch = {name: rng.standard_normal((given.pairs, *shape)).astype(np.float16) for name in ("winner", "loser")}
    batch["input_ids"] = pipeline.tokenize(["a woman in a red coat on a bridge"] * given.pairs)
    batch = to_devices(batch, mesh)
    jax.block_until_ready((state, frozen))
    kept = f"weights {size(frozen):.2f}, policy and optimizer {size(policy, state):.2f} GiB"
    print(f"load      {time.perf_counter() - begin:6.1f} s   peak {peak():5.2f} GiB   {kept}", flush=True)

    begin = time.perf_counter()
    compiled = step.lower(state, policy, frozen, batch, numbers).compile()
    temporary = f"temporary values {compiled.memory_analysis().temp_size_in_bytes / 2**30:.2f} GiB"
    print(f"compile   {time.perf_counter() - begin:6.1f} s   peak {peak():5.2f} GiB   {temporary}", flush=True)
    times = []
    for number in range(1, given.steps + 1):
        begin, processor = time.perf_counter(), time.process_time()
        state, metrics = jax.block_until_ready(compiled(state, policy, frozen, batch, numbers))
        seconds, processor = time.perf_counter() - begin, time.process_time() - processor
        times.append(seconds)
        found = {name: float(metrics[name]) for name in SHOWN}
        values = "  ".join(f"{name} {value:.6g}" for name, value in found.items())
        print(f"step {number}    {seconds:6.1f} s   peak {peak():5.2f} GiB   processor {processor:6.1f} s   {values}")
        assert math.isfinite(found["gradient_norm"]) and found["gradient_norm"] > 0
        if number == 1 and given.dtype == "float32":  # bfloat16 rounds policy and reference differently
            assert math.isclose(found["loss/total"], math.log(2), abs_tol=1e-3), "an untrained policy is the reference"
    if len(times) > 2:
        spread = peers.summary(times[2:], 4)
        print(f"a step    {spread['median']} s ({spread['lowest']} to {spread['highest']}), "
              f"{given.pairs / spread['median']:.2f} pairs/s")  # fmt: skip


if __name__ == "__main__":
    main()
