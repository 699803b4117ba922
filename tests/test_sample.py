"""What the sampling command draws is what diffusers draws, with every part of the recipe; and what it refuses."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from flax import nnx
from safetensors.numpy import save_file

from hgdpo_jax.diffusion import pipeline as pipelines
from hgdpo_jax.diffusion import recipe
from hgdpo_jax.diffusion.painter import Painter
from hgdpo_jax.export import PEFT_FILE, PEFT_NORMAL_FILE, PEFT_TEXT_FILE, RECIPE, lora_weights
from hgdpo_jax.models.lora import add_lora
from hgdpo_jax.training.step import split
from tests import tiny

PROMPTS = ["a portrait photograph of a woman, blue background", "a man"]
STEPS, GUIDANCE = 25, 3.0  # of the 25 timesteps two are at least 900


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    return tiny.write_base(folder) if request.param == "sd15" else tiny.write_sdxl(folder)


def shaken(policy: Any, seed: int) -> Any:
    """A LoRA that does something, B included."""
    leaves, tree = jax.tree.flatten(policy)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [x + jnp.asarray(0.4 * rng.standard_normal(x.shape), x.dtype) for x in leaves])


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[pipelines.Pipeline, dict, Path]:
    """A pipeline with LoRA everywhere; the policies hard, normal, text; a folder with their files."""
    pipeline, folder = pipelines.load(base), tmp_path_factory.mktemp("export")
    for i, (name, model) in enumerate(pipeline.models.items()):
        if name != "vae":
            add_lora(model, 2, 2.0, nnx.Rngs(i))
    fresh = {name: split(pipeline, params)[1] for name, params in (("unet", "lora"), ("text", "text_lora"))}
    policies = {"hard": shaken(fresh["unet"], 1), "normal": shaken(fresh["unet"], 2), "text": shaken(fresh["text"], 3)}
    for name, file in (("hard", PEFT_FILE), ("normal", PEFT_NORMAL_FILE), ("text", PEFT_TEXT_FILE)):
        nnx.update(pipeline.networks, policies[name])
        save_file(lora_weights(pipeline.models, "peft", "text" if name == "text" else "unet"), folder / file)
    nnx.update(pipeline.networks, fresh["unet"])
    nnx.update(pipeline.networks, fresh["text"])
    return pipeline, policies, folder


def painter_of(pipeline: pipelines.Pipeline, **settings: Any) -> Painter:
    chosen = {"sampler": "dpmpp_2m", "steps": STEPS, "guidance": GUIDANCE, "batch": 2, "seed": 0} | settings
    return Painter(pipeline, tiny.mesh(), **chosen)


@pytest.fixture(scope="module")
def painter(trained: tuple) -> Painter:
    return painter_of(trained[0])


def ours(painter: Painter, pipeline: pipelines.Pipeline, *policies: Any) -> np.ndarray:
    """Images in [0, 1]."""
    painter.use(*policies)
    latents = painter.generate(pipeline.tokenize(PROMPTS), painter.keys("test", PROMPTS, [0, 1]), (32, 32), "")
    return (painter.decode(latents, "") + 1) / 2


def start(painter: Painter) -> torch.Tensor:
    keys = painter.keys("test", PROMPTS, [0, 1])
    latents = jax.vmap(lambda key: jax.random.normal(jax.random.split(key)[0], tiny.LATENT))(keys)
    return torch.tensor(np.asarray(latents).transpose(0, 3, 1, 2))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """What export puts beside the weights."""
    spec = importlib.util.spec_from_file_location("hgdpo_recipe", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def theirs(script: ModuleType, pipeline: Any, painter: Painter) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "height": 32, "width": 32}
    return script.draw(pipeline, PROMPTS, latents=start(painter), output_type="np", **settings).images


def chosen(policies: dict[str, Any], blocks: str, text: bool) -> list[Any]:
    hard = policies["hard"]
    if blocks != "all":
        hard = recipe.in_up_blocks(hard, policies["normal"] if blocks == "up+normal" else None)
    return [recipe.weighted(policy, 0.5) for policy in (hard, *([policies["text"]] if text else []))]


@pytest.mark.parametrize(("blocks", "text"), [("all", False), ("up", False), ("up+normal", False), ("up", True)])
def test_the_recipe_gives_the_images_of_diffusers(
    base: Path, trained: tuple, painter: Painter, script: ModuleType, tmp_path: Path, blocks: str, text: bool
) -> None:
    pipeline, policies, folder = trained
    for file in folder.iterdir():
        if text or file.name != PEFT_TEXT_FILE:
            (tmp_path / file.name).symlink_to(file)
    reference = DiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32)
    script.load(reference, tmp_path, weight=0.5, blocks=blocks)
    found = ours(painter, pipeline, *chosen(policies, blocks, text))
    assert np.abs(theirs(script, reference, painter) - found).max() <= 2 / 255
    others = [ours(painter, pipeline), ours(painter, pipeline, *chosen(policies, blocks, not text))]
    assert all(np.abs(other - found).max() > 4 / 255 for other in others)


def test_without_policies_the_images_are_those_of_the_base(
    base: Path, trained: tuple, painter: Painter, script: ModuleType, tmp_path: Path
) -> None:
    reference = script.load(DiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32), tmp_path)
    assert np.abs(theirs(script, reference, painter) - ours(painter, trained[0])).max() <= 2 / 255
