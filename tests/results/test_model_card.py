"""The card of an export: its code draws what `sample` draws, and it names what is there and nothing else."""

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from flax import nnx
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file

from hgdpo_jax import config as configuration
from hgdpo_jax.diffusion import pipeline as pipelines
from hgdpo_jax.diffusion import recipe
from hgdpo_jax.diffusion.sampler import Sampler
from hgdpo_jax.diffusion.source import hub_repository
from hgdpo_jax.diffusion.stable_diffusion import STABLE_DIFFUSION
from hgdpo_jax.models.convert import to_torch
from hgdpo_jax.models.lora import add_lora
from hgdpo_jax.results import card_code, exported, model_card
from hgdpo_jax.results.contents import (
    ADAPTER_FILE,
    CHECKPOINT_FILE,
    KOHYA_FILE,
    KOHYA_RECIPE_FILE,
    KOHYA_TEXT_FILE,
    PEFT_FILE,
    PEFT_NORMAL_FILE,
    PEFT_TEXT_FILE,
    RECIPE_FILE,
    Contents,
)
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import write_json
from hgdpo_jax.run.folder import stage_config
from hgdpo_jax.run.settings import load_config
from hgdpo_jax.training.finished import PAIRS
from hgdpo_jax.training.policy import load_trainable, policy_of
from tests import tiny
from tests.rounding import NETWORK

STEPS, GUIDANCE = 6, 2.0  # in place of the recipe's, to draw in a tenth of the time
# Each step adds the UNet's rounding, guidance 2 times that of one half of its batch and once that of the other; and a
# picture has 256 values.
DRAWN = STEPS * (2 * GUIDANCE - 1) * NETWORK + 0.5 / 255
SETTINGS = [*tiny.AS_THE_PAPER, "data.resolutions=32x32", "train.lora_rank=2", "train.lora_alpha=4"]
SETTINGS += ["train.lora_modules=attention,feed_forward,convolutions"]
HUB = f"owner/name@{'0' * 40}"


def code_of(card: str) -> str:
    """The code of a card, as a reader copies it."""
    return "\n".join(line[4:] for line in card.splitlines() if line.startswith("    ") or not line)


def pictures(folder: Path, start: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """What the parts of a card draw, run from top to bottom in the card's folder, in [0, 1].

    Args:
        folder: of the card.
        start: latents that are drawn from, [1, h, w, c].
        monkeypatch: of the test.
    """
    drawing = STABLE_DIFFUSION.drawing({})
    recipes = f"num_inference_steps={drawing.steps}, guidance_scale={drawing.guidance}"
    code = code_of((folder / "README.md").read_text())
    assert code.count(recipes) == len(re.findall("^image = ", code, re.MULTILINE))
    code = code.replace(recipes, f"num_inference_steps={STEPS}, guidance_scale={GUIDANCE}")
    latents = torch.tensor(start.transpose(0, 3, 1, 2))
    for cls in (StableDiffusionPipeline, StableDiffusionXLPipeline):
        monkeypatch.setattr(cls, "prepare_latents", lambda *_, **__: latents.clone())
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, RECIPE_FILE.removesuffix(".py"), raising=False)
    drawn: list[Any] = []
    exec(re.sub("^(image = .*)$", r"\1; drawn.append(image)", code, flags=re.MULTILINE), {"drawn": drawn})
    return [np.asarray(image) / 255 for image in drawn]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its text encoder's config says float16, as SDXL's."""
    folder = tiny.write_base(tmp_path_factory.mktemp("base"))
    path = folder / "text_encoder" / "config.json"
    write_json(path, json.loads(path.read_text()) | {"torch_dtype": "float16"})
    return folder


def moved(policy: Any) -> Any:
    """A policy that does something."""
    return jax.tree.map(lambda x: x + 0.1 * np.cos(np.arange(x.size, dtype=np.float32)).reshape(x.shape), policy)


@pytest.fixture(scope="module", autouse=True)
def trained() -> Iterator[None]:
    """Stages are trained as soon as they are started."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exported, "finished_policy", lambda workdir, stage, like, config, step: moved(like))
        patch.setattr(exported, "finished_step", lambda workdir, stage, step: stage_config(workdir, stage).train.steps)
        patch.setattr(exported, "made_from", lambda workdir, stage: {PAIRS: "0" * 64})
        yield


def config_of(base: Path | str, stage: str, *changes: str) -> ConfigDict:
    script = {"stage0": "stage0_sft"}.get(stage, stage)
    return load_config(f"configs/{script}.py:portraits", [*SETTINGS, f"model.base={base}", *changes])


def start(workdir: Path, base: Path, stage: str, *changes: str) -> None:
    write_json(workdir / stage / "config.json", configuration.to_json(config_of(base, stage, *changes)))


class Drawn:
    """Our pictures under a policy of the UNet, from the same latents."""

    def __init__(self, base: Path) -> None:
        self.pipeline, prompts = load_trainable(config_of(base, "stage1"), tiny.mesh()), [card_code.PROMPT] * 2
        settings = {"solver": "dpmpp_2m", "steps": STEPS, "guidance": GUIDANCE, "batch": 2, "seed": 0}
        self.sampler = Sampler(self.pipeline, tiny.mesh(), **settings)
        self.ids, self.keys = self.pipeline.tokenize(prompts), self.sampler.keys("test", prompts, [0, 0])
        shape = self.pipeline.latent_shape((32, 32))
        self.start = np.asarray(jax.random.normal(jax.random.split(self.keys[0])[0], shape))[None]

    def __call__(self, *policies: Any) -> np.ndarray:
        self.sampler.use_policies(*policies)
        return (self.sampler.decode(self.sampler.generate(self.ids, self.keys, (32, 32), ""), "")[0] + 1) / 2


@pytest.fixture(scope="module")
def drawn(base: Path) -> Drawn:
    return Drawn(base)


def lora(drawn: Drawn, base: Path) -> Any:
    return moved(policy_of(drawn.pipeline, config_of(base, "stage1")))


def unet(drawn: Drawn, base: Path) -> Any:
    return moved(policy_of(load_trainable(config_of(base, "stage0"), tiny.mesh()), config_of(base, "stage0")))


def recipes(blocks: str) -> Callable[[Drawn, Path], Any]:
    return lambda drawn, base: recipe.as_drawn(lora(drawn, base), blocks, 0.5)


ALL = ("diffusers", "peft", "kohya", "ldm")
LORA = {PEFT_FILE, KOHYA_FILE, RECIPE_FILE}
CASES = {
    # stages with settings of their own, formats, merge → files, models and ways to draw, the policy that is drawn with
    "easy": (["stage1"], None, None, LORA, 2, recipes("all")),
    "hard": (["stage3"], ("peft", "ldm"), None, {PEFT_FILE, PEFT_NORMAL_FILE, RECIPE_FILE, CHECKPOINT_FILE}, 2,
             recipes("up")),
    "hard without normal": (["stage3 train.start=stage1"], ("peft",), None, {PEFT_FILE, RECIPE_FILE}, 1, recipes("up")),
    "kohya": (["stage3"], ("kohya",), None, {KOHYA_FILE, KOHYA_RECIPE_FILE}, 0, None),
    "whole": (["given"], ("diffusers", "ldm"), "whole", {CHECKPOINT_FILE}, 2, lora),
    "naive, whole": (["naive"], ("ldm",), "whole", {CHECKPOINT_FILE}, 1, lora),
    "all parameters": (["stage0"], None, None, {CHECKPOINT_FILE}, 2, unet),
    "all parameters beside": (["text_encoder", "stage0"], ("diffusers", "peft"), None, {PEFT_TEXT_FILE, RECIPE_FILE}, 2,
                              None),
    "text encoder": (["text_encoder"], ALL, None, {PEFT_TEXT_FILE, KOHYA_TEXT_FILE, RECIPE_FILE, CHECKPOINT_FILE}, 3,
                     None),
    "beside": (["text_encoder", "stage1"], ALL, None, {*LORA, PEFT_TEXT_FILE, KOHYA_TEXT_FILE, CHECKPOINT_FILE}, 3,
               None),
    "adapter": (["personalise"], ("diffusers",), None, {ADAPTER_FILE}, 1, lambda drawn, base: {}),
    "adapter alone": (["personalise"], ("peft",), None, {ADAPTER_FILE}, 0, None),
}  # fmt: skip


@pytest.mark.parametrize(("stages", "formats", "merge", "files", "ways", "policy"), CASES.values(), ids=CASES.keys())
def test_the_code_of_a_card_draws_what_sample_draws_and_only_what_is_there_is_named(
    stages: list[str], formats: Any, merge: str | None, files: set[str], ways: int, policy: Any,
    base: Path, drawn: Drawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for stage in stages:
        start(tmp_path, base, *stage.split())
    last, out = stages[-1].split()[0], tmp_path / "out"
    exported.export(tmp_path, out, last, formats, None, merge)
    card = (out / "README.md").read_text()
    there = {path.name for path in out.iterdir() if path.suffix in (".py", ".safetensors")}
    assert there == files == set(re.findall(r"\w+\.(?:safetensors|py)\b", card))
    assert ("a diffusers folder" in card) == (out / "model_index.json").is_file() == (out / "unet").is_dir()
    about = json.loads((out / "hgdpo.json").read_text())
    assert (about["blocks"], about["weight"]) == ("up" if last in ("stage3", "naive") else "all", 0.5)
    models = {"diffusers", "ldm"} & {*about["formats"]} and last not in ("stage0", "personalise")
    assert about["merge"] == ((merge or "recipe") if models else None)
    for merged, words in (("recipe", "merged as the recipe draws with it"), ("whole", "merged whole")):
        assert (words in card) == (about["merge"] == merged)
    found = pictures(out, drawn.start, monkeypatch)
    assert len(found) == ways
    if policy is not None:
        expected = drawn(policy(drawn, base))
        for image in found:
            np.testing.assert_allclose(image, expected, rtol=0, atol=DRAWN)
        differs = [np.abs(drawn(other) - expected).max() > 2 * DRAWN for other in ({}, lora(drawn, base))]
        assert differs == [last != "personalise", merge != "whole"]


def test_the_text_encoders_lora_is_merged_at_half_its_weight_or_whole(base: Path, tmp_path: Path) -> None:
    start(tmp_path, base, "text_encoder")
    key, changes = "encoder.layers.0.self_attn.q_proj.weight", []
    before = load_file(base / "text_encoder" / "model.safetensors")[key]
    for merge in (None, "whole"):
        exported.export(tmp_path, tmp_path / f"{merge}", "text_encoder", ["diffusers"], None, merge)
        after = load_file(tmp_path / f"{merge}" / "text_encoder" / "model.safetensors")
        told = json.loads((tmp_path / f"{merge}" / "text_encoder" / "config.json").read_text())
        assert told["torch_dtype"] == "float32"
        assert {name.partition(".")[0] for name in after} == {"text_model"}
        changes.append(after[f"text_model.{key}"] - before)
    np.testing.assert_allclose(2 * changes[0], changes[1], atol=1e-6)
    assert np.abs(changes[1]).max() > 1e-3


@pytest.mark.parametrize(
    ("stage", "formats", "merge", "line"),
    [
        ("stage0", None, "whole", "--merge whole: stage0 trained no LoRA; leave it out"),
        ("stage1", ["peft", "kohya"], "recipe", "--merge recipe: LoRA files are not merged; leave it out"),
        ("personalise", None, "recipe", "--merge recipe: personalise trained no LoRA; leave it out"),
    ],
)
def test_a_merge_of_nothing_is_refused(
    stage: str, formats: Any, merge: str, line: str, base: Path, tmp_path: Path
) -> None:
    start(tmp_path, base, stage)
    with pytest.raises(UserError, match=line):
        exported.export(tmp_path, tmp_path / "out", stage, formats, None, merge)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff\xfe", b"{}"])
def test_a_folder_whose_note_is_not_ours_is_not_overwritten(damage: bytes, base: Path, tmp_path: Path) -> None:
    start(tmp_path, base, "stage1")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "hgdpo.json").write_bytes(damage)
    with pytest.raises(UserError, match="out: holds something else; choose another --out"):
        exported.export(tmp_path, tmp_path / "out", formats=["peft"])
    assert (tmp_path / "out" / "hgdpo.json").read_bytes() == damage


def contents(base: Path | str, pipeline: pipelines.Pipeline, *changes: str) -> Contents:
    config = config_of(base, "stage1", *changes)
    return Contents(pipeline, "stage1", config.train.steps, {"stage1": config}, {}, ("peft",), None)


ABOUT = {"base": "0" * 64, "pairs": "0" * 64, "policies": {"stage1": "0" * 64}}


@pytest.mark.parametrize("form", ["folder", "file", "folder that looks like the hub", "hub"])
def test_the_front_matter_names_a_base_on_the_hub_or_none(
    form: str, base: Path, drawn: Drawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.safetensors").touch()
    if form.startswith("folder that"):
        Path(HUB).mkdir(parents=True)
    name = {"folder": base, "file": "one.safetensors"}.get(form, HUB)
    card = model_card.text(contents(name, drawn.pipeline), ABOUT, [PEFT_FILE, RECIPE_FILE])
    front = card.split("---")[1]
    assert re.findall(r"^base_model: (.*)$", front, re.MULTILINE) == (['"owner/name"'] if form == "hub" else [])
    assert hub_repository(str(name)) == (("owner/name", "0" * 40) if form == "hub" else None)
    said = HUB if form == "hub" else Path(name).name  # not the folders of this machine
    assert f"\n- Base model: `{said}`; sha256" in card
    if form == "hub":
        line = f'pipeline = DiffusionPipeline.from_pretrained("owner/name", revision="{"0" * 40}", dtype=torch.float32)'
        assert line in code_of(card).splitlines() and card.splitlines()[8].startswith("# name, stage1 of")


def test_resolution_rank_and_rate_stand_in_the_card(base: Path, drawn: Drawn) -> None:
    changes = ["train.lora_rank=3", "train.lora_alpha=1.5", "train.lr=2e-6", "data.resolutions=64x96,96x64"]
    card = model_card.text(contents(base, drawn.pipeline, *changes), ABOUT, [PEFT_FILE, RECIPE_FILE])
    for words in ("LoRA of the UNet, rank 3, alpha 1.5", "learning rate 2e-06", "64x96, 96x64", "height=64, width=96"):
        assert words in card


def loaded(contents: Contents) -> Any:
    """The pipeline of the code that loads ε_base."""
    code, found = card_code.draw_with_recipe(contents), {}
    exec("\n".join(line for line in code if not re.match("from hgdpo_recipe|load|image = ", line)), found)
    return found["pipeline"]


def test_the_code_that_loads_the_base_gives_its_vae_and_its_lora(base: Path, drawn: Drawn, tmp_path: Path) -> None:
    other = tmp_path / "vae"
    tiny.save_model(tiny.random_model(tiny.AutoencoderKL, tiny.TINY_VAE, 9), other)
    pipeline = pipelines.load_pipeline(base)
    add_lora(pipeline.denoiser, 2, 2.0, nnx.Rngs(0))
    nnx.update(pipeline.denoiser, moved(nnx.state(pipeline.denoiser, nnx.LoRAParam)))
    save_file(pipeline.layout.lora_weights(pipeline.models, "peft"), tmp_path / "lora.safetensors")
    for vae in (other, other / "diffusion_pytorch_model.safetensors"):
        changes = [f"model.vae={vae}", f"model.lora={tmp_path / 'lora.safetensors'}"]
        found = loaded(contents(base, drawn.pipeline, *changes))
        expected = pipelines.load_pipeline(base, vae=vae, lora=tmp_path / "lora.safetensors")
        for part in ("unet", "vae"):
            theirs, ours = getattr(found, part).state_dict(), to_torch(expected.models[part])
            assert ours.keys() == theirs.keys()
            for key, value in ours.items():
                np.testing.assert_allclose(theirs[key].numpy(), value, atol=1e-6, err_msg=key)
    key = "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    assert np.abs(to_torch(expected.denoiser)[key] - to_torch(pipeline.denoiser)[key]).max() > 1e-3


def test_the_code_that_loads_the_base_names_all_of_its_path_and_finds_half_precision(
    base: Path, drawn: Drawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(base, tmp_path / "base")
    for path in (tmp_path / "base").rglob("*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))
    monkeypatch.chdir(tmp_path)
    given = contents("base", drawn.pipeline)
    code = card_code.load_base(given)
    line = f'pipeline = DiffusionPipeline.from_pretrained("{tmp_path}/base", variant="fp16", dtype=torch.float32)'
    assert code == [line] and loaded(given).text_encoder.dtype == torch.float32


def test_the_code_that_loads_a_single_file_says_that_it_predicts_v(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(base, tmp_path / "v")
    scheduler = tiny.SCHEDULER | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    write_json(tmp_path / "v" / "scheduler" / "scheduler_config.json", scheduler)
    pipeline = pipelines.load_pipeline(tmp_path / "v")
    exported.write_checkpoint(pipeline, tmp_path / "one.safetensors", "a title")
    # Offline; diffusers takes the file for an SD1.5, whose configs it has.
    single = partial(StableDiffusionPipeline.from_single_file, config=str(base), local_files_only=True)
    monkeypatch.setattr(StableDiffusionPipeline, "from_single_file", single)
    found = loaded(contents(tmp_path / "one.safetensors", pipeline))
    told = found.scheduler.config
    assert (told.prediction_type, told.rescale_betas_zero_snr) == ("v_prediction", True)
    for key, value in to_torch(pipeline.denoiser).items():
        assert np.array_equal(found.unet.state_dict()[key].numpy(), value)
