"""What export writes gives, in PyTorch diffusers, our images, and others than the base's."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from flax import nnx
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file
from transformers import CLIPTokenizer

from hgdpo_jax import config as configuration
from hgdpo_jax.diffusion import pipeline as pipelines
from hgdpo_jax.diffusion import recipe
from hgdpo_jax.diffusion.sampler import Sampler
from hgdpo_jax.models.lora import add_lora
from hgdpo_jax.results.exported import CHECKPOINT_FILE, KOHYA_FILE, KOHYA_RECIPE_FILE, PEFT_FILE, export, lora_weights
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import file_hash
from hgdpo_jax.run.folder import stage_config
from hgdpo_jax.run.settings import load_config
from hgdpo_jax.training import loop
from hgdpo_jax.training.checkpoints import Checkpoints
from hgdpo_jax.training.finished import finished_policy
from hgdpo_jax.training.policy import load_trainable, policy_of
from tests import tiny
from tests.rounding import NETWORK, assert_close

PROMPTS = ["a portrait photograph of a woman, blue background, soft light", "a portrait photograph of a man"]
STEPS, GUIDANCE = 6, 2.0
CHANGES = ["train.steps=3", "train.lr=0.02", "train.warmup=1", "train.batch=8", "train.lora_alpha=4",
           "evaluate.batch=8", "evaluate.steps=1", "train.eval_every=100"]  # fmt: skip
# Each step adds the UNet's rounding, guidance 2 times that of one half of its batch and once that of the other.
DRAWN = STEPS * (2 * GUIDANCE - 1) * NETWORK


@pytest.fixture(scope="module", params=["portraits", "sdxl"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded base, and a random one in the shape of SDXL."""
    if request.param == "portraits":
        return configuration.ASSETS / "portraits" / "base"
    return tiny.write_sdxl(tmp_path_factory.mktemp("sdxl"))


def at_once(config: ConfigDict, folder: Path, inputs: Any, start: Any, checkpoints: Checkpoints, traced: range) -> None:
    """In place of the steps, which would only have to be compiled: the checkpoint of a LoRA that does something."""
    moved = lambda x: np.asarray(x) + 0.1 * np.cos(np.arange(x.size, dtype=np.float32)).reshape(x.shape)  # noqa: E731
    policy = jax.tree.map(lambda x: jax.device_put(moved(x), x.sharding), start.state.policy)
    checkpoints.save(config.train.steps, start.state._replace(policy=policy), {"made_from": inputs.made_from})


@pytest.fixture(scope="module")
def workdir(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage whose steps are left out, exported. test_runs.py exports what was trained."""
    folder = tmp_path_factory.mktemp("run")
    export(trained_at_once(folder, "configs/stage1.py:portraits", base), folder / "export")
    return folder


def draw(pipeline: pipelines.Pipeline, *trained: Any) -> tuple[np.ndarray, list[np.ndarray]]:
    """(starting latents, images in [0, 1] of each policy)."""
    sampler = Sampler(pipeline, tiny.mesh(), solver="dpmpp_2m", steps=STEPS, guidance=GUIDANCE, batch=2, seed=0)
    keys = sampler.keys("test", PROMPTS, [0, 1])
    shape = pipeline.latent_shape((64, 64))
    start = jax.vmap(lambda key: jax.random.normal(jax.random.split(key)[0], shape))(keys)
    images = []
    for policy in trained:
        sampler.use_policies(policy)
        latents = sampler.generate(pipeline.tokenize(PROMPTS), keys, (64, 64), "")
        images.append((sampler.decode(latents, "") + 1) / 2)
    return np.asarray(start), images


@pytest.fixture(scope="module")
def ours(workdir: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(starting latents, images in [0, 1] of the policy, of the base)."""
    config = stage_config(workdir, "stage1")
    pipeline = load_trainable(config, tiny.mesh())
    fresh = policy_of(pipeline, config)
    start, (policy, base) = draw(pipeline, finished_policy(workdir, "stage1", fresh, config), fresh)
    return start, policy, base


def theirs(pipeline: Any, start: np.ndarray) -> np.ndarray:
    latents = torch.tensor(start.transpose(0, 3, 1, 2))
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "height": 64, "width": 64}
    return pipeline(PROMPTS, latents=latents, output_type="np", **settings).images


def test_the_exported_folder_gives_our_images_in_diffusers(workdir: Path, ours: tuple) -> None:
    start, policy, base = ours
    found = theirs(DiffusionPipeline.from_pretrained(workdir / "export", dtype=torch.float32), start)
    assert_close(policy, found, DRAWN)
    assert np.abs(found - base).max() > 10 * DRAWN


@pytest.mark.parametrize("name", [PEFT_FILE, KOHYA_FILE])
def test_the_exported_lora_on_the_base_gives_our_images_in_diffusers(
    base: Path, workdir: Path, ours: tuple, name: str
) -> None:
    start, policy, without = ours
    pipeline = DiffusionPipeline.from_pretrained(base, dtype=torch.float32)
    assert_close(without, theirs(pipeline, start), DRAWN)
    pipeline.load_lora_weights(workdir / "export", weight_name=name)
    assert_close(policy, theirs(pipeline, start), DRAWN)


@pytest.mark.parametrize("kind", ["peft", "kohya"])
def test_a_lora_of_the_text_encoders_too_gives_our_images_in_diffusers(base: Path, tmp_path: Path, kind: str) -> None:
    pipeline = pipelines.load_pipeline(base)
    for i, model in enumerate([m for name, m in pipeline.models.items() if name != "vae"]):
        add_lora(model, 4, 2.0, nnx.Rngs(i))
        lora = nnx.state(model, nnx.LoRAParam)
        nnx.update(model, jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), lora))
    start, (images,) = draw(pipeline, {"unet": nnx.state(pipeline.unet, nnx.LoRAParam)})
    both = lora_weights(pipeline.models, kind, "unet") | lora_weights(pipeline.models, kind, "text")
    save_file(both, tmp_path / "lora.safetensors")
    reference = DiffusionPipeline.from_pretrained(base, dtype=torch.float32)
    assert np.abs(theirs(reference, start) - images).max() > 10 * DRAWN
    reference.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    assert_close(images, theirs(reference, start), DRAWN)


def trained_at_once(folder: Path, config: str, base: Path, *changes: str) -> Path:
    """A run of one stage whose steps are left out."""
    shape = pipelines.load_pipeline(base).latent_shape((64, 64))
    settings = load_config(config, [*CHANGES, f"model.base={base}", *changes])
    tiny.write_pairs(folder / settings.stage / "pairs", shape=shape, resolution="64x64")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_run", at_once)
        loop.train(settings, folder)
    return folder


@pytest.mark.parametrize("base", ["sdxl"], indirect=True)
def test_one_file_draws_as_the_recipe_does(base: Path, tmp_path: Path) -> None:
    folder = trained_at_once(tmp_path / "run", "configs/naive.py:portraits", base)
    export(folder, tmp_path / "export", "naive", ["kohya"])
    config = stage_config(folder, "naive")
    pipeline = load_trainable(config, tiny.mesh())
    policy = finished_policy(folder, "naive", policy_of(pipeline, config), config)
    start, (expected, whole) = draw(pipeline, recipe.as_drawn(policy, "up"), policy)
    keys = load_file(tmp_path / "export" / KOHYA_RECIPE_FILE).keys()
    assert keys and all("up_blocks" in key or "output_blocks" in key for key in keys)
    reference = DiffusionPipeline.from_pretrained(base, dtype=torch.float32)
    reference.load_lora_weights(tmp_path / "export", weight_name=KOHYA_RECIPE_FILE)
    found = theirs(reference, start)
    assert_close(expected, found, DRAWN)
    assert np.abs(found - whole).max() > 10 * DRAWN


def test_a_whole_model_is_a_folder_and_a_single_file(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base")
    folder = trained_at_once(tmp_path / "run", "configs/stage1.py:portraits", base, "train.params=all")
    export(folder, tmp_path / "export")
    names = {path.name for path in (tmp_path / "export").iterdir()}
    assert CHECKPOINT_FILE in names and "model_index.json" in names
    assert not any("lora" in name for name in names)
    one = load_file(tmp_path / "export" / CHECKPOINT_FILE)["model.diffusion_model.input_blocks.0.0.weight"]
    other = load_file(tmp_path / "export" / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.weight"]
    assert np.array_equal(one, other)
    with pytest.raises(UserError, match="stage1 trained all parameters and has no LoRA; add diffusers or ldm"):
        export(folder, tmp_path / "other", formats=["kohya"])


def test_what_is_not_written_is_not_named(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base")
    index = json.loads((base / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True,
              "feature_extractor": ["transformers", "CLIPImageProcessor"]}  # fmt: skip
    (base / "model_index.json").write_text(json.dumps(index))
    folder = trained_at_once(tmp_path / "run", "configs/stage1.py:portraits", base)
    export(folder, tmp_path / "export", formats=["diffusers"])
    found = DiffusionPipeline.from_pretrained(tmp_path / "export", dtype=torch.float32)
    assert found.safety_checker is None and found.feature_extractor is None
    tokenizer = tmp_path / "export" / "tokenizer"
    (tokenizer / "tokenizer.json").unlink()
    again = CLIPTokenizer.from_pretrained(tokenizer)  # of vocab.json and merges.txt
    assert again(PROMPTS).input_ids == found.tokenizer(PROMPTS).input_ids


def test_kohya_scales_by_alpha(workdir: Path) -> None:
    weights = load_file(workdir / "export" / KOHYA_FILE)
    alphas = {key: float(value) for key, value in weights.items() if key.endswith(".alpha")}
    assert set(alphas.values()) == {4.0} and len(weights) == 3 * len(alphas)


def test_the_card_says_where_the_model_comes_from(base: Path, workdir: Path) -> None:
    card = (workdir / "export" / "README.md").read_text()
    origin = json.loads((workdir / "export" / "hgdpo.json").read_text())
    config = stage_config(workdir, "stage1")
    hashes = (origin["policies"]["stage1"], configuration.config_hash(config))
    hashes += (file_hash(workdir / "stage1" / "pairs" / "manifest.json"),)
    for part in (str(base), "stage1", *hashes, PEFT_FILE, KOHYA_FILE):
        assert part in card


@pytest.mark.parametrize("base", ["portraits"], indirect=True)
def test_only_what_is_asked_for_is_written(workdir: Path, tmp_path: Path) -> None:
    export(workdir, tmp_path / "lora", formats=["kohya"])
    assert sorted(p.name for p in (tmp_path / "lora").iterdir()) == ["README.md", "hgdpo.json", KOHYA_FILE]
    with pytest.raises(UserError, match="--format onnx: unknown; choose from diffusers,peft,kohya,ldm"):
        export(workdir, tmp_path / "other", formats=["onnx"])


@pytest.mark.parametrize("base", ["portraits"], indirect=True)
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
