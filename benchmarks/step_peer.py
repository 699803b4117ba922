"""An optimizer step of Stable Diffusion 1.5 beside PyTorch's, with diffusers and peft, doing the same work.

python -m benchmarks.step_peer [--size 256x256] [--pairs 1] [--rounds 5] [--programs hgdpo_jax "reference cached"]

Random weights, float32, on this machine's processor: stage 1 of `configs/stage1.py` with LoRA of rank 8 on every
attention, the text encoder in the step, forwards and backwards through the policy, forwards through the reference (in
PyTorch: the adapter switched off), clipping, AdamW. A process each, steps alternately; compilation does not count. Ours
may also have the reference's predictions at hand (`train.reference_cache`), or train the up blocks only. Both gain from
an allocator that keeps large memory: `MALLOC_ARENA_MAX=1` before the command, or tcmalloc in `LD_PRELOAD`.

JSON to stdout.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks import peers
from hgdpo_jax import config as configuration
from hgdpo_jax.devices.mesh import local_mesh
from hgdpo_jax.devices.processor import keep_memory
from hgdpo_jax.devices.start import start
from hgdpo_jax.devices.xla import use_precision
from hgdpo_jax.diffusion import pipeline as pipelines
from hgdpo_jax.diffusion.source import without_weights
from hgdpo_jax.models.architectures import SD15, Architecture
from hgdpo_jax.run.settings import load_config, validate
from hgdpo_jax.training import step as steps
from hgdpo_jax.training.optimizer import make_optimizer, numbers_of
from hgdpo_jax.training.policy import add_fresh_lora, configured


def ours(size: str, pairs: int, blocks: str = "all", cached: bool = False) -> Callable[[], float]:
    """A function that takes a step and returns the loss."""
    config = load_config("configs/stage1.py:sd15")
    config.model.dtype, config.data.resolutions = "float32", (size,)
    config.train.batch, config.train.checkpointing, config.train.blocks = pairs, "none", blocks
    validate(config)
    start()
    use_precision("float32")
    mesh = local_mesh()
    keep_memory(mesh)
    pipeline = pipelines.of_shapes(without_weights(SD15), "float32")
    pipeline = configured(pipeline, config, mesh)
    add_fresh_lora(pipeline, config)
    denoiser, *parts = steps.split_params(pipeline, "lora")
    rng = np.random.default_rng(0)

    def filled(x: Any) -> jax.Array:
        if isinstance(x, jax.Array):
            return x
        if len(x.shape) < 2:
            return jnp.zeros(x.shape)
        return jnp.asarray(rng.standard_normal(x.shape, np.float32) / np.sqrt(np.prod(x.shape[:-1])))

    policy, frozen = jax.tree.map(filled, parts)
    tx = make_optimizer(config.train)
    step = steps.make_step(steps.preference_loss(denoiser, pipeline.schedule, blocks), tx, 1)
    shape = (pairs, *pipeline.latent_shape(next(iter(configuration.resolutions(config).values()))))
    batch = {name: rng.standard_normal(shape, np.float32).astype(np.float16) for name in ("winner", "loser")}
    batch["input_ids"] = np.full((pairs, 77), 49407, np.int32)
    if cached:
        batch["example"] = np.arange(pairs, dtype=np.int32)
        batch["reference"] = rng.standard_normal((pairs, 2, *shape[1:]), np.float32)
    held = [steps.init_state(policy, tx, 0.0)]

    def run() -> float:
        held[0], metrics = step(held[0], policy, frozen, batch, numbers_of(config, 0))
        return float(metrics["loss/total"])

    return run


def theirs(
    size: str,
    pairs: int,
    device: str = "cpu",
    dtype: str = "float32",
    backend: str | None = None,
    architecture: Architecture = SD15,
) -> Callable[[], torch.Tensor]:
    """The same with PyTorch. Frozen weights have the dtype, which products are computed in; LoRA is float32.

    Args:
        size, pairs: as of :func:`ours`.
        device, dtype: of PyTorch.
        backend: of torch.compile; None does not compile.
        architecture: of SD1.5's kind.
    """
    train, frozen = load_config("configs/stage1.py:sd15").train, getattr(torch, dtype)
    with torch.device(device):
        unet = UNet2DConditionModel.from_config(dict(architecture.configs["unet"]))
        text = CLIPTextModel(CLIPTextConfig(**dict(architecture.configs["text_encoder"])))
    text = text.to(frozen).requires_grad_(False)
    unet = unet.to(frozen).requires_grad_(False)
    if device != "cpu":
        unet = unet.to(memory_format=torch.channels_last)
    lora = LoraConfig(r=8, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    unet.add_adapter(lora)
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=train.lr, weight_decay=0.0)
    height, width = (int(side) // 8 for side in size.split("x"))
    latents = torch.randn(2 * pairs, 4, height, width, device=device)
    ids = torch.full((pairs, 77), 49407, device=device)
    alphas = torch.linspace(0.9999, 0.005, 1000, device=device)
    predict = torch.compile(unet, backend=backend) if backend else unet

    def run() -> torch.Tensor:
        t = torch.randint(0, 1000, (pairs,), device=device).repeat(2)
        noise = torch.randn(pairs, 4, height, width, device=device).repeat(2, 1, 1, 1)
        alpha = alphas[t].view(-1, 1, 1, 1)
        x_t = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        with torch.autocast(device, frozen, enabled=frozen != torch.float32):
            with torch.no_grad():
                memory = text(ids).last_hidden_state.repeat(2, 1, 1)
                unet.disable_adapters()
                reference = predict(x_t, t, memory).sample.float()
                unet.enable_adapters()
            predicted = predict(x_t, t, memory).sample.float()
        gain = ((predicted - reference) * (predicted + reference - 2 * noise)).mean((1, 2, 3))
        loss = -torch.nn.functional.logsigmoid(-0.5 * train.beta * (gain[:pairs] - gain[pairs:])).mean()
        moved = ((predicted - reference)[:pairs]).mean((2, 3)).square().sum(1).mean()  # the statistics loss
        optimizer.zero_grad()
        (loss + train.lambda_stat * moved).backward()
        torch.nn.utils.clip_grad_norm_(trained, train.clip_norm)
        optimizer.step()
        return loss.detach()

    return run


RUNS = {
    "hgdpo_jax": ours,
    "diffusers + peft": theirs,
    "reference cached": partial(ours, cached=True),
    "up blocks": partial(ours, blocks="up"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Times a step of SD1.5 here and in PyTorch.")
    parser.add_argument("--size", default="256x256")
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--programs", nargs=2, choices=RUNS, default=list(RUNS)[:2], help="the first against the second"
    )
    parser.add_argument("--only", choices=RUNS, help="is how each of the two is started")
    given = parser.parse_args()
    if given.only:
        return peers.serve(RUNS[given.only](given.size, given.pairs))
    seconds = peers.alternately("benchmarks.step_peer", given.programs, given.rounds)
    figures = {name: peers.summary(found, 3) for name, found in seconds.items()}
    one, other = (statistics.median(x) for x in seconds.values())
    print(json.dumps({"size": given.size, "pairs": given.pairs, "seconds": figures, "ratio": other / one}, indent=2))


if __name__ == "__main__":
    main()
