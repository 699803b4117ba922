"""What export writes gives, in PyTorch diffusers, our images, and others than the base's."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from hgdpo_jax import config as configuration
from hgdpo_jax.curriculum.candidates import Painter
from hgdpo_jax.errors import UserError
from hgdpo_jax.export import LORA_FILE, export
from hgdpo_jax.training import policy as policies
from hgdpo_jax.training.loop import train
from tests import tiny

PROMPTS = ["a portrait photograph of a woman, blue background, soft light", "a portrait photograph of a man"]
STEPS, GUIDANCE = 6, 2.0


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded base after three coarse steps on random pairs."""
    folder = tmp_path_factory.mktemp("run")
    tiny.write_pairs(folder / "stage1" / "pairs", shape=(8, 8, 8))
    changes = ["train.steps=3", "train.lr=0.02", "train.warmup=1", "train.batch=8", "evaluate.batch=8",
               "evaluate.steps=1", "train.eval_every=100"]  # fmt: skip
    train(configuration.load("configs/stage1.py:portraits", changes), folder)
    export(folder, folder / "export")
    return folder


@pytest.fixture(scope="module")
def ours(workdir: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(starting latents, images in [0, 1] of the policy, of the base)."""
    mesh, config = tiny.mesh(), policies.stage_config(workdir, "stage1")
    pipeline = policies.load(config, mesh)
    painter = Painter(pipeline, mesh, sampler="dpmpp_2m", steps=STEPS, guidance=GUIDANCE, batch=2, seed=0)
    keys = painter.keys("test", PROMPTS, [0, 1])
    start = jax.vmap(lambda key: jax.random.normal(jax.random.split(key)[0], (8, 8, 8)))(keys)
    images = []
    for policy in (policies.finished(workdir, "stage1", policies.of(pipeline, config)), policies.of(pipeline, config)):
        painter.use(policy)
        latents = painter.generate(pipeline.tokenize(PROMPTS), keys, (64, 64), "")
        images.append((painter.decode(latents, "") + 1) / 2)
    return np.asarray(start), images[0], images[1]


def theirs(pipeline: StableDiffusionPipeline, start: np.ndarray) -> np.ndarray:
    latents = torch.tensor(start.transpose(0, 3, 1, 2))
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "height": 64, "width": 64}
    return pipeline(PROMPTS, latents=latents, output_type="np", **settings).images


def test_the_exported_folder_gives_our_images_in_diffusers(workdir: Path, ours: tuple) -> None:
    start, policy, base = ours
    found = theirs(StableDiffusionPipeline.from_pretrained(workdir / "export", torch_dtype=torch.float32), start)
    assert np.abs(found - policy).max() <= 2 / 255
    assert np.abs(found - base).max() > 20 / 255


def test_the_exported_lora_on_the_base_gives_our_images_in_diffusers(workdir: Path, ours: tuple) -> None:
    start, policy, base = ours
    folder = configuration.ASSETS / "portraits" / "base"
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    assert np.abs(theirs(pipeline, start) - base).max() <= 2 / 255
    pipeline.load_lora_weights(workdir / "export", weight_name=LORA_FILE)
    assert np.abs(theirs(pipeline, start) - policy).max() <= 2 / 255


def test_exporting_again_changes_nothing_and_another_folder_is_not_overwritten(workdir: Path, tmp_path: Path) -> None:
    before = json.loads((workdir / "export" / "hgdpo.json").read_text())
    export(workdir, workdir / "export")
    assert json.loads((workdir / "export" / "hgdpo.json").read_text()) == before
    (tmp_path / "mine").write_text("keep me")
    with pytest.raises(UserError, match="holds something else; choose another --out"):
        export(workdir, tmp_path)
    assert (tmp_path / "mine").read_text() == "keep me"


def test_a_workdir_without_a_stage_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no stage was trained in .*; run first: .*configs/stage1.py"):
        export(tmp_path, tmp_path / "out")
