"""What export writes computes in ComfyUI what it computes here, with ComfyUI's own code for files, LoRA and models:

    COMFYUI=its folder python -m pytest -s tests/full/comfyui.py

in an environment that has its requirements too. Weights are random. Stable Diffusion 1.5 and the VAEs are of full size,
as ComfyUI knows no other; of FLUX.2-klein two heads and four blocks do. Takes 10 GB of memory, and on two cores five
minutes.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jaxtyping import Float
from ml_collections import ConfigDict

from hgdpo_jax import config as configuration
from hgdpo_jax.diffusion import recipe
from hgdpo_jax.diffusion.pipeline import Pipeline
from hgdpo_jax.models.architectures import SD15
from hgdpo_jax.results import exported
from hgdpo_jax.run.files import write_json
from hgdpo_jax.run.settings import load_config
from hgdpo_jax.training.policy import load_trainable, policy_of, set_policy
from tests import klein, tiny
from tests.full.components import write_folder
from tests.models.parity import deviations

TOLERANCE = 1e-4  # of the output's deviation
PROMPT = "a portrait photograph of a woman with glasses, soft light"
T, SIGMA = 500, 0.6  # where they predict: a timestep of Stable Diffusion, a share of noise


@pytest.fixture(scope="module")
def comfy() -> SimpleNamespace:
    """ComfyUI's modules, on the processor."""
    sys.path.insert(0, os.environ["COMFYUI"])
    from comfy.cli_args import args

    args.cpu = True
    from comfy import sd, utils

    return SimpleNamespace(sd=sd, read=utils.load_torch_file)


@pytest.fixture(scope="module", autouse=True)
def trained() -> Iterator[None]:
    """Stages are trained as soon as they are started."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exported, "finished_policy", lambda workdir, stage, like, config, step: moved(like))
        patch.setattr(exported, "finished_step", lambda workdir, stage, step: 1)
        patch.setattr(exported, "made_from", lambda workdir, stage: {exported.PAIRS: "0" * 64})
        yield


def moved(policy: Any) -> Any:
    """A policy that does something, in every layer."""
    return jax.tree.map(lambda x: x + 0.05 * np.cos(np.arange(x.size, dtype=np.float32)).reshape(x.shape), policy)


def export(workdir: Path, stage: str, *configs: ConfigDict) -> tuple[Path, Pipeline]:
    """The export of a run in all forms, and its pipeline, whose own weights are `base.safetensors` beside it."""
    for config in configs:
        write_json(workdir / config.stage / "config.json", configuration.to_json(config))
    exported.export(workdir, workdir / "export", stage, exported.FORMATS)
    pipeline = load_trainable(configs[0], tiny.mesh(), *configs[1:])
    exported.write_checkpoint(pipeline, workdir / "export" / "base.safetensors", "base")
    return workdir / "export", pipeline


class Run(NamedTuple):
    """What is exported, and what it gives here."""

    out: Path
    noisy: Float[np.ndarray, "b h w c"]
    text: Float[np.ndarray, "b s d"]
    latents: Float[np.ndarray, "1 h w c"]
    predicted: Mapping[str, np.ndarray]  # by how the LoRA acts
    image: Float[np.ndarray, "1 H W 3"]  # in [-1, 1]


def run(out: Path, pipeline: Pipeline, config: ConfigDict, level: float, width: int, size: tuple[int, int]) -> Run:
    """Predictions of the denoiser, at a noise level, of random latents and texts of a width; and a decoded latent."""
    rng = np.random.default_rng(0)
    shape = (*pipeline.latent_shape(size),)
    noisy, text = (rng.standard_normal(x).astype(np.float32) for x in ((2, *shape), (2, 77, width)))
    latents = rng.standard_normal((1, *shape)).astype(np.float32)
    fresh, denoiser, predicted = policy_of(pipeline, config), pipeline.denoiser, {}
    for name, policy in {
        "base": fresh,
        "whole": moved(fresh),
        "half": recipe.weighted(moved(fresh), 0.5),
        "recipe": recipe.as_drawn(moved(fresh), config.recipe.blocks, config.recipe.weight),
    }.items():
        set_policy(pipeline, policy)
        levels = jnp.full(2, level)
        predicted[name] = np.asarray(denoiser(jnp.asarray(noisy), levels, denoiser.read_text(jnp.asarray(text))))
    assert min(np.abs(predicted["base"] - predicted[name]).max() for name in ("whole", "half", "recipe")) > 0.02
    image = np.asarray(pipeline.vae.to_images(jnp.asarray(latents)))
    return Run(out, noisy, text, latents, predicted, np.clip(image, -1, 1))


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.tensor(x).permute(0, 3, 1, 2)


def denoised(patcher: Any, noisy: torch.Tensor, sigma: float, text: np.ndarray) -> torch.Tensor:
    """ComfyUI's model's picture, of latents and a noise level as it counts them, with the LoRA that was added to it."""
    patcher.patch_model(force_patch_weights=True)
    with torch.no_grad():
        return patcher.model.apply_model(noisy, torch.full((len(noisy),), sigma), c_crossattn=torch.tensor(text))


def agrees(name: str, ours: np.ndarray, theirs: torch.Tensor) -> None:
    found = deviations(ours, theirs.detach())
    print(f"\n{name}: largest error {found:.1e} standard deviations")
    assert found < TOLERANCE


FLOAT32 = {"dtype": torch.float32}


def test_klein(comfy: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"in_channels": 128, "num_layers": 2, "attention_head_dim": 128, "axes_dims_rope": (32,) * 4}
    monkeypatch.setattr(klein, "TRANSFORMER", klein.TRANSFORMER | shape | {"timestep_guidance_channels": 256})
    monkeypatch.setattr(klein, "VAE", {})
    settings = [f"model.base={klein.write(tmp_path / 'base')}", "model.dtype=float32", "data.resolutions=64x96"]
    modules = "train.lora_modules=attention,feed_forward"
    config = load_config("configs/stage1.py:klein", [*settings, modules, "train.lora_rank=2"])
    out, pipeline = export(tmp_path / "run", "stage1", config)
    ours = run(out, pipeline, config, SIGMA, 96, (64, 96))

    def load(name: str) -> Any:
        return comfy.sd.load_diffusion_model_state_dict(comfy.read(str(out / name)), model_options=FLOAT32)

    def predict(patcher: Any) -> torch.Tensor:
        noisy = nchw(ours.noisy)
        return ((noisy - denoised(patcher, noisy, SIGMA, ours.text)) / SIGMA).permute(0, 2, 3, 1)

    agrees("transformer", ours.predicted["base"], predict(load("base.safetensors")))
    agrees("checkpoint", ours.predicted["recipe"], predict(load("checkpoint.safetensors")))
    for file in ("kohya_lora.safetensors", "pytorch_lora_weights.safetensors"):
        for strength, name in ((1.0, "whole"), (0.5, "half")):
            base = load("base.safetensors")
            patcher, _ = comfy.sd.load_lora_for_models(base, None, comfy.read(str(out / file)), strength, 0)
            agrees(f"{file} at {strength}", ours.predicted[name], predict(patcher))
    vae = comfy.sd.VAE(sd=comfy.read(str(out / "vae" / "diffusion_pytorch_model.safetensors")), **FLOAT32)
    agrees("VAE", ours.image, 2 * vae.decode(nchw(ours.latents)) - 1)


def test_stable_diffusion(comfy: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    write_folder(SD15, SD15.configs, tmp_path / "base")
    settings = [f"model.base={tmp_path / 'base'}", "model.dtype=float32", "data.resolutions=128x128"]
    config, text, normal = (load_config(f"configs/{x}.py:sd15", settings) for x in ("stage3", "text_encoder", "stage2"))
    write_json(tmp_path / "run" / "stage2" / "config.json", configuration.to_json(normal))
    out, pipeline = export(tmp_path / "run", "stage3", config, text)
    ours, states = run(out, pipeline, config, T, 768, (128, 128)), {}
    fresh = policy_of(pipeline, text)
    for name, policy in {"base": fresh, "whole": moved(fresh)}.items():
        set_policy(pipeline, policy)
        ids = jnp.asarray(pipeline.tokenize([PROMPT]))
        states[name] = np.asarray(pipeline.text.encode(ids).encoder_hidden_states)

    def load(name: str) -> Any:
        how = {"model_options": FLOAT32, "te_model_options": FLOAT32}
        return comfy.sd.load_checkpoint_guess_config(str(out / name), **how)[:3]

    def predict(patcher: Any) -> torch.Tensor:
        sigma = float(patcher.model.model_sampling.sigma(torch.tensor([float(T)])))
        noisy = nchw(ours.noisy) * (sigma**2 + 1) ** 0.5
        return ((noisy - denoised(patcher, noisy, sigma, ours.text)) / sigma).permute(0, 2, 3, 1)

    def encode(clip: Any) -> torch.Tensor:
        return clip.encode_from_tokens(clip.tokenize(PROMPT))

    model, clip, vae = load("base.safetensors")
    agrees("UNet", ours.predicted["base"], predict(model))
    agrees("text encoder", states["base"], encode(clip))
    agrees("VAE", ours.image, 2 * vae.decode(nchw(ours.latents / 0.18215)) - 1)
    agrees("checkpoint", ours.predicted["recipe"], predict(load("checkpoint.safetensors")[0]))
    for file, strength, name in (
        ("kohya_lora.safetensors", 1.0, "whole"),
        ("kohya_lora.safetensors", 0.5, "half"),
        ("kohya_recipe_lora.safetensors", 1.0, "recipe"),
        ("kohya_text_encoder_lora.safetensors", 1.0, "text"),
    ):
        model, clip, _ = load("base.safetensors")
        lora = comfy.sd.load_lora_for_models(model, clip, comfy.read(str(out / file)), strength, strength)
        if name == "text":
            agrees(file, states["whole"], encode(lora[1]))
        else:
            agrees(f"{file} at {strength}", ours.predicted[name], predict(lora[0]))
