"""An optimizer step beside PyTorch's, with diffusers and peft, doing the same work.

python -m benchmarks.step_peer [--model sd15|klein] [--size 256x256] [--pairs 1] [--rounds 5]
    [--programs hgdpo_jax "reference cached"]

The model is Stable Diffusion 1.5, or a small FLUX.2-klein with heads of the real one's width.

Random weights, float32, on this machine's processor: stage 1 of `configs/stage1.py` with LoRA on every attention,
the text encoder in the step, forwards and backwards through the policy, forwards through the reference (in
PyTorch: the adapter switched off), clipping, AdamW. A process each, steps alternately; compilation does not count. Ours
may also have the reference's predictions at hand (`train.reference_cache`), or train the up blocks only. Both gain from
an allocator that keeps large memory: `MALLOC_ARENA_MAX=1` before the command, or tcmalloc in `LD_PRELOAD`.

JSON to stdout.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import Flux2Transformer2DModel, UNet2DConditionModel
from ml_collections import ConfigDict
from peft import LoraConfig
from transformers import CLIPTextConfig, CLIPTextModel, Qwen3Config, Qwen3Model

from benchmarks import peers
from hgdpo_jax import config as configuration
from hgdpo_jax.devices.mesh import local_mesh
from hgdpo_jax.devices.processor import keep_memory
from hgdpo_jax.devices.start import start
from hgdpo_jax.devices.xla import use_precision
from hgdpo_jax.diffusion import pipeline as pipelines
from hgdpo_jax.diffusion.source import without_weights
from hgdpo_jax.models.architectures import KLEIN_4B, SD15, Architecture
from hgdpo_jax.models.chat import LENGTH
from hgdpo_jax.run.settings import load_config, validate
from hgdpo_jax.training import step as steps
from hgdpo_jax.training.inputs import loss_of
from hgdpo_jax.training.optimizer import make_optimizer, numbers_of
from hgdpo_jax.training.policy import add_fresh_lora, configured


def _small(part: str, **changes: int) -> dict[str, Any]:
    return {**KLEIN_4B.configs[part], **changes}


READ = (1, 2, 3)  # layers of its text encoder
KLEIN = replace(
    KLEIN_4B,
    configs={
        "transformer": _small(
            "transformer", num_attention_heads=4, num_layers=1, num_single_layers=4, joint_attention_dim=3 * 512
        ),
        "vae": KLEIN_4B.configs["vae"],
        "text_encoder": _small(
            "text_encoder", hidden_size=512, intermediate_size=1536, num_attention_heads=4, num_key_value_heads=1,
            num_hidden_layers=4, vocab_size=512,
        ),
    },
)  # fmt: skip
ARCHITECTURES = {"sd15": SD15, "klein": KLEIN}


def ours(size: str, pairs: int, model: str = "sd15", blocks: str = "all", cached: bool = False) -> Callable[[], float]:
    """A function that takes a step and returns the loss."""
    config = load_config(f"configs/stage1.py:{model}")
    config.model.dtype, config.data.resolutions = "float32", (size,)
    config.train.batch, config.train.checkpointing, config.train.blocks = pairs, "none", blocks
    validate(config)
    start()
    use_precision("float32")
    mesh = local_mesh()
    keep_memory(mesh)
    source = without_weights(ARCHITECTURES[model])
    pipeline = pipelines.of_shapes(source, "float32")
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
    step = steps.make_step(loss_of(config, denoiser, pipeline.schedule, mesh), tx, 1)
    shape = (pairs, *pipeline.latent_shape(next(iter(configuration.resolutions(config).values()))))
    batch: dict[str, Any] = {
        name: rng.standard_normal(shape, np.float32).astype(np.float16) for name in ("winner", "loser")
    }
    batch["input_ids"] = source.family.tokenize(source.tokenizers, ["a person"] * pairs)
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

    def noised(noise: torch.Tensor) -> tuple[Callable[[], torch.Tensor], torch.Tensor]:
        t = torch.randint(0, 1000, (pairs,), device=device).repeat(2)
        alpha = alphas[t].view(-1, 1, 1, 1)
        x_t = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        with torch.no_grad():
            memory = text(ids).last_hidden_state.repeat(2, 1, 1)
        return lambda: predict(x_t, t, memory).sample, noise

    return _step(unet, optimizer, latents, noised, train, frozen)


def theirs_klein(size: str, pairs: int) -> Callable[[], torch.Tensor]:
    """The same with PyTorch for the small FLUX.2-klein."""
    train = load_config("configs/stage1.py:klein").train
    transformer = Flux2Transformer2DModel.from_config(dict(KLEIN.configs["transformer"])).requires_grad_(False)
    text = Qwen3Model(Qwen3Config(**dict(KLEIN.configs["text_encoder"]))).requires_grad_(False)
    modules = "to_q|to_k|to_v|to_out.0|add_q_proj|add_k_proj|add_v_proj|to_add_out|to_qkv_mlp_proj"
    single = r"single_transformer_blocks\.\d+\.attn\.to_out"
    lora = LoraConfig(r=train.lora_rank, lora_alpha=train.lora_alpha, target_modules=rf".*\.({modules})|{single}")
    transformer.add_adapter(lora)
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=train.lr, weight_decay=0.0)
    height, width = (int(side) // 16 for side in size.split("x"))
    latents = torch.randn(2 * pairs, height * width, 128)
    ids = torch.zeros(pairs, LENGTH, dtype=torch.int64)
    zero, one = torch.arange(1), torch.arange
    image_ids = torch.cartesian_prod(zero, one(height), one(width), zero)
    text_ids = torch.cartesian_prod(zero, zero, zero, one(LENGTH))

    def noised(noise: torch.Tensor) -> tuple[Callable[[], torch.Tensor], torch.Tensor]:
        level = torch.sigmoid(torch.randn(pairs))
        sigma = (train.noise_shift * level / (1 + (train.noise_shift - 1) * level)).repeat(2)
        at = sigma.view(-1, 1, 1)
        x = (1 - at) * latents + at * noise
        with torch.no_grad():
            states = text(ids, output_hidden_states=True).hidden_states
            memory = torch.cat([states[layer] for layer in READ], -1).repeat(2, 1, 1)
        return lambda: transformer(x, memory, sigma, image_ids, text_ids).sample, noise - latents

    return _step(transformer, optimizer, latents, noised, train, torch.float32)


def _step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    latents: torch.Tensor,
    noised: Callable[[torch.Tensor], tuple[Callable[[], torch.Tensor], torch.Tensor]],
    train: ConfigDict,
    dtype: torch.dtype,
) -> Callable[[], torch.Tensor]:
    """A step of Diffusion-DPO on latents whose first half are winners.

    Args:
        model: has an adapter.
        noised: noise, the same for winner and loser → what predicts from the noised latents, and its target.
        dtype: that products are computed in.
    """
    pairs, rest, device = len(latents) // 2, latents.shape[1:], latents.device
    places = (1,) if latents.ndim == 3 else (2, 3)

    def run() -> torch.Tensor:
        noise = torch.randn(pairs, *rest, device=device).repeat(2, *[1] * len(rest))
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            predict, target = noised(noise)
            with torch.no_grad():
                model.disable_adapters()
                reference = predict().float()
                model.enable_adapters()
            predicted = predict().float()
        gain = ((predicted - reference) * (predicted + reference - 2 * target)).flatten(1).mean(1)
        loss = -torch.nn.functional.logsigmoid(-0.5 * train.beta * (gain[:pairs] - gain[pairs:])).mean()
        moved = ((predicted - reference)[:pairs]).mean(places).square().sum(1).mean()  # the statistics loss
        optimizer.zero_grad()
        (loss + train.lambda_stat * moved).backward()
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], train.clip_norm)
        optimizer.step()
        return loss.detach()

    return run


OURS = "hgdpo_jax"
PROGRAMS: dict[tuple[str, str], Callable[[str, int], Callable[[], Any]]] = {
    ("sd15", OURS): ours,
    ("sd15", "diffusers + peft"): theirs,
    ("sd15", "reference cached"): partial(ours, cached=True),
    ("sd15", "up blocks"): partial(ours, blocks="up"),
    ("klein", OURS): partial(ours, model="klein"),
    ("klein", "diffusers + peft"): theirs_klein,
    ("klein", "reference cached"): partial(ours, model="klein", cached=True),
}


def main() -> None:
    names = sorted({name for _, name in PROGRAMS})
    parser = argparse.ArgumentParser(description="Times a step here and in PyTorch.")
    parser.add_argument("--model", choices=ARCHITECTURES, default="sd15")
    parser.add_argument("--size", default="256x256")
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--programs", nargs=2, choices=names, default=[OURS, "diffusers + peft"],
                        help="the first against the second")  # fmt: skip
    parser.add_argument("--only", choices=names, help="is how each of the two is started")
    given = parser.parse_args()
    if given.only:
        return peers.serve(PROGRAMS[given.model, given.only](given.size, given.pairs))
    seconds = peers.alternately("benchmarks.step_peer", given.programs, given.rounds)
    figures = {name: peers.summary(found, 3) for name, found in seconds.items()}
    one, other = (statistics.median(x) for x in seconds.values())
    print(json.dumps({"model": given.model, "size": given.size, "pairs": given.pairs, "seconds": figures,
                      "ratio": other / one}, indent=2))  # fmt: skip


if __name__ == "__main__":
    main()
