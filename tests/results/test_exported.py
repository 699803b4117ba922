"""What export writes gives, in PyTorch diffusers, our images, and others than the base's."""

import json
import shutil
from collections.abc import Iterator
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
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from hgdpo_jax import __version__
from hgdpo_jax import config as configuration
from hgdpo_jax.diffusion import pipeline as pipelines
from hgdpo_jax.diffusion import recipe
from hgdpo_jax.diffusion.sampler import Sampler
from hgdpo_jax.models.lora import add_lora
from hgdpo_jax.results import card_code
from hgdpo_jax.results.contents import CHECKPOINT_FILE, KOHYA_FILE, KOHYA_RECIPE_FILE, PEFT_FILE
from hgdpo_jax.results.exported import FORMATS, export
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import file_hash, write_json
from hgdpo_jax.run.folder import stage_config
from hgdpo_jax.run.settings import load_config
from hgdpo_jax.training import inputs, loop
from hgdpo_jax.training.checkpoints import Checkpoints
from hgdpo_jax.training.finished import finished_policy
from hgdpo_jax.training.policy import load_trainable, policy_of
from tests import tiny
from tests.results.test_model_card import GUIDANCE, STEPS, pictures
from tests.rounding import NETWORK, assert_close

PROMPTS = [card_code.PROMPT, "a portrait photograph of a man"]
CHANGES = [*tiny.AS_THE_PAPER, "data.resolutions=32x32", "train.batch=8", "train.lora_rank=2", "train.lora_alpha=4"]
CHANGES += ["train.lora_modules=attention,feed_forward,convolutions"]
# Each step adds the UNet's rounding, guidance 2 times that of one half of its batch and once that of the other.
DRAWN = STEPS * (2 * GUIDANCE - 1) * NETWORK


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    return tiny.write_base(folder) if request.param == "sd15" else tiny.write_sdxl(folder)


@pytest.fixture(scope="module", autouse=True)
def one_device() -> Iterator[None]:
    """Where weights lie does not matter here, and programs of one device compile in half the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "make_mesh", lambda *_: tiny.mesh())
        yield


def at_once(config: ConfigDict, folder: Path, inputs: Any, start: Any, checkpoints: Checkpoints, *_: Any) -> None:
    """In place of the steps, which would only have to be compiled: the checkpoint of a LoRA that does something."""
    moved = lambda x: np.asarray(x) + 0.1 * np.cos(np.arange(x.size, dtype=np.float32)).reshape(x.shape)  # noqa: E731
    policy = jax.tree.map(lambda x: jax.device_put(moved(x), x.sharding), start.state.policy)
    checkpoints.save(config.train.steps, start.state._replace(policy=policy), {"made_from": inputs.made_from})


@pytest.fixture(scope="module")
def workdir(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage whose steps are left out, exported. test_runs.py exports what was trained."""
    folder = tmp_path_factory.mktemp("run")
    export(trained_at_once(folder, "configs/naive.py:portraits", base), folder / "export", "naive", FORMATS)
    return folder


def draw(pipeline: pipelines.Pipeline, *trained: Any) -> tuple[np.ndarray, list[np.ndarray]]:
    """(starting latents, images in [0, 1] of each policy)."""
    sampler = Sampler(pipeline, tiny.mesh(), solver="dpmpp_2m", steps=STEPS, guidance=GUIDANCE, batch=2, seed=0)
    keys = sampler.keys("test", PROMPTS, [0, 1])
    shape = pipeline.latent_shape((32, 32))
    start = jax.vmap(lambda key: jax.random.normal(jax.random.split(key)[0], shape))(keys)
    images = []
    for policy in trained:
        sampler.use_policies(policy)
        latents = sampler.generate(pipeline.tokenize(PROMPTS), keys, (32, 32), "")
        images.append((sampler.decode(latents, "") + 1) / 2)
    return np.asarray(start), images


@pytest.fixture(scope="module")
def ours(workdir: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(starting latents, images in [0, 1] of the policy, of the policy as the recipe draws with it, of the base)."""
    config = stage_config(workdir, "naive")
    pipeline = load_trainable(config, tiny.mesh())
    fresh = policy_of(pipeline, config)
    policy = finished_policy(workdir, "naive", fresh, config)
    start, images = draw(pipeline, policy, recipe.as_drawn(policy, "up", 0.5), fresh)
    return start, *images


def theirs(pipeline: Any, start: np.ndarray) -> np.ndarray:
    latents = torch.tensor(start.transpose(0, 3, 1, 2))
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "height": 32, "width": 32}
    return pipeline(PROMPTS, latents=latents, output_type="np", **settings).images


def test_the_exported_folder_gives_our_images_in_diffusers(workdir: Path, ours: tuple) -> None:
    start, policy, as_drawn, base = ours
    found = theirs(DiffusionPipeline.from_pretrained(workdir / "export", dtype=torch.float32), start)
    assert_close(as_drawn, found, DRAWN)
    assert min(np.abs(found - other).max() for other in (base, policy)) > 10 * DRAWN


def test_each_way_to_draw_of_the_card_gives_our_image(
    workdir: Path, ours: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As folder, as one file and with the recipe's script; test_model_card.py tries other stages."""
    start, policy, as_drawn, base = ours
    found = pictures(workdir / "export", start[:1], monkeypatch)
    assert len(found) == 3
    for image in found:
        np.testing.assert_allclose(image, as_drawn[0], rtol=0, atol=DRAWN + 0.5 / 255)
        assert min(np.abs(image - other[0]).max() for other in (base, policy)) > 2 / 255


@pytest.mark.parametrize(("name", "kind"), [("text_encoder", CLIPTextModel),
                                            ("text_encoder_2", CLIPTextModelWithProjection)])  # fmt: skip
def test_text_encoders_have_the_names_that_transformers_4_and_5_read(workdir: Path, name: str, kind: Any) -> None:
    """transformers 4 expects these keys, and draws the others at random. Its 4.57.6 has loaded such a folder."""
    folder = workdir / "export" / name
    if not folder.is_dir():  # SD 1.5 has no second one
        assert "text_encoder_2" not in json.loads((workdir / "export" / "model_index.json").read_text())
        return
    weights, layers = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    inside = [f"self_attn.{x}_proj" for x in "qkv"] + ["self_attn.out_proj", "mlp.fc1", "mlp.fc2"]
    modules = [f"encoder.layers.{i}.{module}" for i in range(layers["num_hidden_layers"])
               for module in (*inside, "layer_norm1", "layer_norm2")]  # fmt: skip
    expected = {f"text_model.{m}.{leaf}" for m in (*modules, "final_layer_norm") for leaf in ("weight", "bias")}
    expected |= {f"text_model.embeddings.{x}_embedding.weight" for x in ("token", "position")}
    assert weights.keys() == expected | ({"text_projection.weight"} if name == "text_encoder_2" else set())
    found, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    theirs = {key.removeprefix("text_model."): value.numpy() for key, value in found.state_dict().items()}
    for key, value in weights.items():
        assert np.array_equal(theirs[key.removeprefix("text_model.")], value)


def test_the_exported_lora_on_the_base_gives_our_images_in_diffusers(base: Path, workdir: Path, ours: tuple) -> None:
    start, policy, as_drawn, without = ours
    reference = DiffusionPipeline.from_pretrained(base, dtype=torch.float32)
    assert_close(without, theirs(reference, start), DRAWN)
    for file, expected in ((PEFT_FILE, policy), (KOHYA_FILE, policy), (KOHYA_RECIPE_FILE, as_drawn)):
        reference.load_lora_weights(workdir / "export", weight_name=file)
        assert_close(expected, theirs(reference, start), DRAWN)
        reference.unload_lora_weights()
    assert np.abs(policy - as_drawn).max() > 10 * DRAWN
    keys = load_file(workdir / "export" / KOHYA_RECIPE_FILE).keys()
    assert keys and all("up_blocks" in key or "output_blocks" in key for key in keys)


def test_a_lora_of_all_layers_of_the_text_encoders_too_gives_our_images_in_diffusers(
    base: Path, tmp_path: Path
) -> None:
    pipeline = pipelines.load_pipeline(base)
    for i, model in enumerate([m for name, m in pipeline.models.items() if name != "vae"]):
        add_lora(model, 4, 2.0, nnx.Rngs(i), ("attention", "feed_forward", "convolutions"))
        lora = nnx.state(model, nnx.LoRAParam)
        nnx.update(model, jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), lora))
    start, (images,) = draw(pipeline, {"unet": nnx.state(pipeline.denoiser, nnx.LoRAParam)})
    reference = DiffusionPipeline.from_pretrained(base, dtype=torch.float32)
    assert np.abs(theirs(reference, start) - images).max() > 10 * DRAWN
    for kind in ("peft", "kohya"):
        save_file(pipeline.layout.lora_weights(pipeline.models, kind), tmp_path / f"{kind}.safetensors")
        reference.load_lora_weights(tmp_path, weight_name=f"{kind}.safetensors")
        assert_close(images, theirs(reference, start), DRAWN)
        reference.unload_lora_weights()


def trained_at_once(folder: Path, config: str, base: Path, *changes: str) -> Path:
    """A run of one stage whose steps are left out."""
    settings = load_config(config, [*CHANGES, f"model.base={base}", *changes])
    tiny.write_pairs(folder / settings.stage / "pairs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_run", at_once)
        loop.train(settings, folder)
    return folder


def test_a_whole_model_is_a_folder_and_a_single_file_and_what_is_not_written_is_not_named(tmp_path: Path) -> None:
    base, out = tiny.write_base(tmp_path / "base"), tmp_path / "export"
    index = json.loads((base / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True,
              "feature_extractor": ["transformers", "CLIPImageProcessor"]}  # fmt: skip
    (base / "model_index.json").write_text(json.dumps(index))
    folder = trained_at_once(
        tmp_path / "run", "configs/stage1.py:portraits", base, "train.params=all", "model.dtype=bfloat16"
    )
    export(folder, out)
    names = {path.name for path in out.iterdir()}
    assert CHECKPOINT_FILE in names and "model_index.json" in names and not any("lora" in name for name in names)
    one = load_file(out / CHECKPOINT_FILE)["model.diffusion_model.input_blocks.0.0.weight"]
    other = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.weight"]
    assert np.array_equal(one, other)
    name = "text_encoder/model.safetensors"  # which is not trained, and kept in full precision
    before, after = load_file(base / name), load_file(out / name)
    assert all(after[f"text_model.{key}"].dtype == np.float32 for key in before)
    assert all(np.array_equal(after[f"text_model.{key}"], before[key]) for key in before)
    with pytest.raises(UserError, match="stage1 trained all parameters and has no LoRA; add diffusers or ldm"):
        export(folder, tmp_path / "other", formats=["kohya"])
    found = DiffusionPipeline.from_pretrained(out, dtype=torch.float32)
    assert found.safety_checker is None and found.feature_extractor is None
    (out / "tokenizer" / "tokenizer.json").unlink()
    again = CLIPTokenizer.from_pretrained(out / "tokenizer")  # of vocab.json and merges.txt
    assert again(PROMPTS).input_ids == found.tokenizer(PROMPTS).input_ids


def test_kohya_scales_by_alpha(workdir: Path) -> None:
    weights = load_file(workdir / "export" / KOHYA_FILE)
    alphas = {key: float(value) for key, value in weights.items() if key.endswith(".alpha")}
    assert set(alphas.values()) == {4.0} and len(weights) == 3 * len(alphas)


def test_the_card_says_where_the_model_comes_from(base: Path, workdir: Path) -> None:
    card = (workdir / "export" / "README.md").read_text()
    origin = json.loads((workdir / "export" / "hgdpo.json").read_text())
    assert origin["version"] == __version__ and __version__ in card
    hashes = (origin["policies"]["naive"], configuration.config_hash(stage_config(workdir, "naive")))
    hashes += (file_hash(workdir / "naive" / "pairs" / "manifest.json"),)
    for part in (str(base), "naive", *hashes, PEFT_FILE, KOHYA_FILE):
        assert part in card


@pytest.mark.parametrize("base", ["sd15"], indirect=True)
def test_the_card_says_which_step_it_is_of(workdir: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(workdir, tmp_path / "run"))
    done, config = stage_config(run, "naive").train.steps, json.loads((run / "naive" / "config.json").read_text())
    config["train"]["steps"] = done + 20
    write_json(run / "naive" / "config.json", config)
    export(run, tmp_path / "out", "naive", formats=["kohya"], step="latest")
    assert f"- Stage: `naive`, {done} of {done + 20} steps of " in (tmp_path / "out" / "README.md").read_text()
    assert f"- Stage: `naive`, {done} steps of " in (workdir / "export" / "README.md").read_text()


@pytest.mark.parametrize("base", ["sd15"], indirect=True)
def test_only_what_is_asked_for_is_written_and_nothing_overwritten(workdir: Path, tmp_path: Path) -> None:
    export(workdir, tmp_path / "lora", "naive", formats=["kohya"])
    written = ["README.md", "hgdpo.json", KOHYA_FILE, KOHYA_RECIPE_FILE]
    assert sorted(p.name for p in (tmp_path / "lora").iterdir()) == written
    with pytest.raises(UserError, match="--format onnx: unknown; choose from diffusers,peft,kohya,ldm"):
        export(workdir, tmp_path / "other", "naive", formats=["onnx"])
    before = (tmp_path / "lora" / "hgdpo.json").stat().st_mtime_ns
    export(workdir, tmp_path / "lora", "naive", formats=["kohya"])
    assert (tmp_path / "lora" / "hgdpo.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="holds something else; choose another --out"):
        export(workdir, tmp_path / "lora", "naive", formats=["peft"])
    assert sorted(p.name for p in (tmp_path / "lora").iterdir()) == written


@pytest.mark.parametrize("formats", [["peft"], ["kohya"], ["peft", "kohya"]])
def test_files_of_lora_are_written_without_the_weights_of_the_base(
    formats: list[str], workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("load_pipeline", "base_hash"):
        monkeypatch.setattr(pipelines, name, lambda *_, **__: pytest.fail("reads the base"))
    export(workdir, tmp_path / "lora", "naive", formats=formats)
    found, whole = tmp_path / "lora", workdir / "export"
    written = {path.name for path in found.glob("*.safetensors")}
    assert written == {"peft": {PEFT_FILE}, "kohya": {KOHYA_FILE, KOHYA_RECIPE_FILE}}.get(
        ",".join(formats), {PEFT_FILE, KOHYA_FILE, KOHYA_RECIPE_FILE}
    )
    assert all((found / name).read_bytes() == (whole / name).read_bytes() for name in written)
    bases = (json.loads((folder / "hgdpo.json").read_text())["base"] for folder in (found, whole))
    assert len({*bases}) == 1


def test_an_export_that_was_killed_while_it_moved_up_is_finished(workdir: Path, tmp_path: Path) -> None:
    export(workdir, tmp_path / "whole", "naive", formats=["kohya"])
    shutil.copytree(tmp_path / "whole", tmp_path / "half" / ".partial")
    (tmp_path / "half" / ".partial" / KOHYA_FILE).rename(tmp_path / "half" / KOHYA_FILE)
    export(workdir, tmp_path / "half", "naive", formats=["kohya"])
    whole, half = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("whole", "half"))
    assert whole == half


def test_a_workdir_without_a_stage_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no stage was trained in .*; run first: .*configs/stage1.py"):
        export(tmp_path, tmp_path / "out")
