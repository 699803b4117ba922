"""What export writes of a FLUX.2-klein draws our pictures in diffusers, in each form."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from ml_collections import ConfigDict
from safetensors import safe_open
from safetensors.numpy import load_file

from hgdpo_jax import config as configuration
from hgdpo_jax.diffusion import pipeline as pipelines
from hgdpo_jax.diffusion.sampler import Sampler
from hgdpo_jax.diffusion.source import open_source
from hgdpo_jax.models import layouts
from hgdpo_jax.models.architectures import KLEIN_4B
from hgdpo_jax.results import card_code, exported
from hgdpo_jax.results.contents import CHECKPOINT_FILE, KOHYA_FILE, PEFT_FILE, Contents
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import write_json
from hgdpo_jax.run.settings import load_config
from hgdpo_jax.training.policy import load_trainable, policy_of
from tests import klein, tiny
from tests.models.parity import deviations
from tests.results.test_model_card import HUB, code_of, moved

STEPS, GUIDANCE, SIZE, WEIGHT = 3, 4.0, (32, 24), 0.5
TOLERANCE = 1e-4  # of the pictures' deviation


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return klein.write(tmp_path_factory.mktemp("klein"))


def config_of(folder: Path | str) -> ConfigDict:
    settings = [f"model.base={folder}", "model.dtype=float32", "data.resolutions=32x24", "train.lora_rank=2"]
    settings += ["train.lora_alpha=4", "train.lora_modules=attention,feed_forward"]
    return load_config("configs/stage1.py:klein", settings)


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run whose stage is trained as soon as it is started."""
    workdir = tmp_path_factory.mktemp("run")
    write_json(workdir / "stage1" / "config.json", configuration.to_json(config_of(folder)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exported, "finished_policy", lambda workdir, stage, like, config, step: moved(like))
        patch.setattr(exported, "finished_step", lambda workdir, stage, step: 1)
        patch.setattr(exported, "made_from", lambda workdir, stage: {exported.PAIRS: "0" * 64})
        yield workdir


@pytest.fixture(scope="module")
def out(trained: Path) -> Path:
    exported.export(trained, trained / "out", formats=exported.FORMATS)
    return trained / "out"


@pytest.fixture(scope="module")
def ours(folder: Path) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """(starting latents, pictures in [-1, 1] of the policy as the recipe draws with it, of the base)."""
    config = config_of(folder)
    pipeline = load_trainable(config, tiny.mesh())
    fresh, prompts = policy_of(pipeline, config), [card_code.PROMPT]
    sampler = Sampler(pipeline, tiny.mesh(), solver="euler", steps=STEPS, guidance=GUIDANCE, batch=1, seed=0)
    ids, drawn_with = pipeline.tokenize(prompts), sampler.keys("test", prompts, [0])
    start = jax.random.normal(jax.random.split(drawn_with[0])[0], pipeline.latent_shape(SIZE))
    pictures = []
    for policy in (exported.recipe.as_drawn(moved(fresh), "all", WEIGHT), fresh):
        sampler.use_policies(policy)
        pictures.append(sampler.decode(sampler.generate(ids, drawn_with, SIZE, ""), ""))
    assert np.abs(pictures[0] - pictures[1]).max() > 0.05
    return torch.tensor(np.asarray(start)).permute(2, 0, 1)[None], *pictures


def settings(start: torch.Tensor) -> dict[str, Any]:
    """How the tiny model draws."""
    return {"num_inference_steps": STEPS, "latents": start, "output_type": "pt"}


SMALL = {"max_sequence_length": klein.TOKENS, "text_encoder_out_layers": klein.LAYERS}  # what of it is smaller


def test_each_way_to_draw_of_the_card_gives_our_pictures(
    folder: Path, out: Path, ours: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder, the transformer as one file, and the LoRA on the base."""
    start, expected, _ = ours
    code = code_of((out / "README.md").read_text())
    how = "num_inference_steps=50, guidance_scale=4.0, height=32, width=24, "
    how += ", ".join(f"{key}={value}" for key, value in SMALL.items())
    assert (
        code.count(f'image = pipeline(prompt="{card_code.PROMPT}", {how}).images[0]\n') == 3
        and code.count("pipeline.load_lora_weights") == 1
    )
    monkeypatch.chdir(out)
    drawn: list[Any] = []
    code = code.replace("num_inference_steps=50", "**more").replace(".images[0]\n", ".images; drawn.append(image)\n")
    exec(code, {"drawn": drawn, "more": settings(start)})
    for found in drawn:
        assert deviations(expected, 2 * found.permute(0, 2, 3, 1) - 1) < TOLERANCE


def test_the_code_of_a_base_that_is_a_file_or_on_the_hub(out: Path) -> None:
    pipeline = pipelines.of_shapes(open_source(str(out)))

    def contents(base: Path | str) -> Contents:
        return Contents(pipeline, "stage1", 1, {"stage1": config_of(base)}, {}, ("ldm",), None)

    found: dict[str, Any] = {}
    lines = ["import torch", "from diffusers import DiffusionPipeline, Flux2Transformer2DModel"]
    exec("\n".join(lines + card_code.load_base(contents(out / CHECKPOINT_FILE))), found)
    weights = load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")
    theirs = found["pipeline"].transformer.state_dict()
    assert theirs.keys() == weights.keys()
    assert all(np.array_equal(theirs[key].numpy(), value) for key, value in weights.items())
    assert card_code.load_checkpoint(contents(HUB)) == [
        'transformer = Flux2Transformer2DModel.from_single_file("checkpoint.safetensors", config="owner/name", '
        'subfolder="transformer", dtype=torch.float32)',
        'pipeline = DiffusionPipeline.from_pretrained("owner/name", transformer=transformer, '
        f'revision="{"0" * 40}", dtype=torch.float32)',
    ]


def test_kohyas_file_on_the_base_gives_our_pictures(folder: Path, out: Path, ours: tuple) -> None:
    start, expected, without = ours
    theirs = Flux2KleinPipeline.from_pretrained(folder, dtype=torch.float32)

    def draw() -> torch.Tensor:
        how = {"guidance_scale": GUIDANCE, "height": 32, "width": 24, **settings(start), **SMALL}
        found = theirs(prompt=card_code.PROMPT, **how).images
        return 2 * found.permute(0, 2, 3, 1) - 1

    assert deviations(without, draw()) < TOLERANCE
    theirs.load_lora_weights(out, weight_name=KOHYA_FILE, adapter_name="policy")
    theirs.set_adapters("policy", WEIGHT)
    assert deviations(expected, draw()) < TOLERANCE
    with safe_open(out / KOHYA_FILE, "numpy") as file:
        assert file.metadata()["modelspec.architecture"] == "Flux.2-klein/lora"  # of no published size
    published = layouts.klein(KLEIN_4B.configs["transformer"])
    assert (published.architecture, published.version) == ("Flux.2-klein-4b", "flux_2_klein_4b")


def test_the_folder_holds_what_the_base_holds(folder: Path, out: Path) -> None:
    assert {path.name for path in out.iterdir()} == {
        *(path.name for path in folder.iterdir()), "README.md", "hgdpo.json", CHECKPOINT_FILE, KOHYA_FILE, PEFT_FILE
    }  # fmt: skip
    assert json.loads((out / "model_index.json").read_text()) == json.loads((folder / "model_index.json").read_text())
    for name in ("model.safetensors", "config.json", "generation_config.json"):  # all layers, as they were
        assert (out / "text_encoder" / name).read_bytes() == (folder / "text_encoder" / name).read_bytes()
    before, after = (load_file(at / "vae" / "diffusion_pytorch_model.safetensors") for at in (folder, out))
    assert before.keys() == after.keys() and "bn.num_batches_tracked" in after
    assert all(np.array_equal(after[key], x) and after[key].dtype == x.dtype for key, x in before.items())


def test_a_file_of_the_transformer_is_a_base_where_it_lies_in_its_folder(out: Path, base: Path, tmp_path: Path) -> None:
    source, folder = open_source(str(out / CHECKPOINT_FILE)), open_source(str(out))
    names = list(folder.open("transformer", ()))
    weights = source.open("transformer", names)
    assert weights.keys() == {*names}
    assert all(np.array_equal(weights[key], x) for key, x in folder.open("transformer", names).items())
    assert out / CHECKPOINT_FILE in source.files and len(source.files) == len(folder.files)
    assert source.open("vae", ()) is not None and source.folder == out
    (tmp_path / CHECKPOINT_FILE).symlink_to(out / CHECKPOINT_FILE)
    with pytest.raises(UserError, match=f"^model {tmp_path}.*: holds a transformer alone; move it into the folder wit"):
        open_source(str(tmp_path / CHECKPOINT_FILE))
    sd = shutil.copytree(base, tmp_path / "sd")
    (sd / CHECKPOINT_FILE).symlink_to(out / CHECKPOINT_FILE)
    with pytest.raises(UserError, match="holds a transformer, and .*sd is a Stable Diffusion; move it into the folder"):
        open_source(str(sd / CHECKPOINT_FILE))
    with pytest.raises(UserError, match="model.vae=.*: is a file; of FLUX.2-klein give the VAE's folder, with its con"):
        open_source(str(out), vae=str(out / "vae" / "diffusion_pytorch_model.safetensors"))
