"""The stages beside the curriculum, from their commands to what is drawn with them."""

import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from hgdpo_jax.checking import check, cost, disk
from hgdpo_jax.checking.check import check_training
from hgdpo_jax.config import to_json
from hgdpo_jax.curriculum import build
from hgdpo_jax.data.pairs import open_stages
from hgdpo_jax.devices.mesh import make_mesh
from hgdpo_jax.diffusion import pipeline as pipelines
from hgdpo_jax.diffusion.sampler import Sampler
from hgdpo_jax.diffusion.source import open_source
from hgdpo_jax.models import ip_adapter
from hgdpo_jax.results import images, measured
from hgdpo_jax.results.contents import (
    ADAPTER_FILE,
    KOHYA_FILE,
    KOHYA_TEXT_FILE,
    PEFT_FILE,
    PEFT_TEXT_FILE,
    RECIPE_FILE,
)
from hgdpo_jax.results.exported import export
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import write_json
from hgdpo_jax.run.folder import stage_config
from hgdpo_jax.run.index import Index
from hgdpo_jax.run.locks import lock_for_all
from hgdpo_jax.run.settings import validate
from hgdpo_jax.training.checkpoints import tree_hash
from hgdpo_jax.training.loop import train
from hgdpo_jax.training.monitor import Monitor
from hgdpo_jax.training.policy import load_trainable
from hgdpo_jax.training.reference_cache import bytes_of_predictions
from hgdpo_jax.training.text_cache import bytes_of_captions
from tests import tiny


@pytest.fixture(scope="module")
def base(one_level: Path) -> Path:
    """The smaller ε_base."""
    return one_level


@pytest.fixture(scope="module")
def workdir(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Easy stage and text encoder, trained for two steps each on the same pairs."""
    folder = tmp_path_factory.mktemp("run")
    tiny.write_pairs(folder / "stage1" / "pairs")
    text = tiny.config(base, "text_encoder", steps=2, params="text_lora", pairs="stage1", lora_rank=4)
    with pytest.raises(UserError, match="text_encoder learns from the pairs of stage1: build those"):
        build.build(text, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Monitor, "evaluate", tiny.glance)
        train(tiny.config(base, steps=2), folder)
        train(text, folder)
    return folder


def test_a_check_of_a_training_says_how_far_it_is_and_what_it_needs(
    workdir: Path, base: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def content() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}

    before, config = content(), tiny.config(base, steps=4)
    planned = cost.plan_step(config, open_source(str(base)), make_mesh(config.mesh))
    monkeypatch.setattr(cost, "plan_step", lambda *_: planned)  # which takes most of the time
    check_training(config, workdir)
    shown = capsys.readouterr().out
    for line in ("data: pairs of heldout, 32x32: 8, train, 32x32: 24\n",
                 f"folder: {workdir}/stage1 stands at step 2 of 4 already\n", "hours: below 0.01 for 4 steps, at 100%",
                 "disk: checkpoints will need "):  # fmt: skip
        assert f"stage1 main: {line}" in shown
    config.train.beta = 7.0
    with pytest.raises(
        UserError, match=r"beta=7\.0: the checkpoint in .*stage1 was made with 5000\.0; .*--resume-with"
    ):
        check_training(config, workdir)
    check_training(config, workdir, ("train.beta",))
    other = tiny.config(base, stage="stage2", steps=4)
    other.train.update(pairs="stage1", start="stage1", wandb="faces")
    monkeypatch.setattr(check, "base_hash", lambda *_: "another")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError) as error:
        check_training(other, workdir)
    start, package = str(error.value).split("; also: ")
    assert start.startswith("content of model.base=sha256 another…: stage1 in ")
    assert package.startswith("config key train.wandb=faces: the package wandb is not installed")
    assert content() == before
    config.train.keep, held = 1, planned[1]
    each = (disk.bytes_of_checkpoints(config, held) - held["reference"]) / 3  # the best, and one being written
    for place, size in (("policy/2/state", each), ("reference", held["reference"])):
        found = sum(path.stat().st_size for path in (workdir / "stage1" / place).rglob("*") if path.is_file())
        assert size < found < size + 100_000  # names and shapes of the arrays, whose sizes do not count
    config.train.update(beta=5000.0, reference_cache=2, text_cache=True)
    monkeypatch.setattr(disk, "require_room", lambda _, folders, needed, what: f"{needed}, {what}")
    with pytest.raises(UserError, match=r"train\.reference_cache=2: the checkpoint"):  # it has none
        check_training(config, workdir)
    pairs, text = open_stages(workdir, ["stage1"], Index()), pipelines.of_shapes(open_source(str(base)), "float32").text
    needed = disk.bytes_of_checkpoints(config, held) + bytes_of_predictions(config, pairs)
    needed += bytes_of_captions(pairs, text)
    what = "checkpoints, the reference's predictions, captions' embeddings"
    assert f"stage1 main: disk: {needed}, {what}\n" in capsys.readouterr().out


def norms(policy: dict) -> list[float]:
    flat = nnx.to_flat_state(policy)
    return [float(abs(x[...]).sum()) for path, x in flat if path[-1] == "lora_B"]


def test_a_run_is_drawn_with_its_text_encoder_and_half_its_lora(workdir: Path) -> None:
    source = images.from_run(workdir, None, 0.5, None, True)
    unet, text = source.policies
    assert (set(unet), set(text)) == ({"unet"}, {"text"})
    whole = images.from_run(workdir, "easy", 1.0, "all", False).policies
    assert len(whole) == 1 and sum(norms(whole[0])) > 0
    np.testing.assert_allclose(norms(unet), [0.5 * x for x in norms(whole[0])], rtol=1e-6)
    assert source.settings["stage"] == "stage1" and source.settings["LoRA blocks"] == "all"
    assert images.from_run(workdir, "base", None, None, True).policies == []
    (alone,) = images.from_run(workdir, "text_encoder", 1.0).policies
    assert set(alone) == {"text"} and sum(norms(alone)) == pytest.approx(2 * sum(norms(text)))
    by_folder = images.from_run(workdir, "stage1", 1.0, "all", False)
    assert by_folder.settings == images.from_run(workdir, "easy", 1.0, "all", False).settings
    for stage, given, line in (
        ("base", (0.5, None), "--lora-weight 0.5: does nothing, base has no LoRA for it"),
        ("base", (None, "up"), "--blocks up: does nothing, base has no LoRA for it"),
        ("text_encoder", (0.5, "all"), "--blocks all: does nothing, text_encoder has no LoRA for it"),
    ):
        with pytest.raises(UserError, match=line):
            images.from_run(workdir, stage, *given)
    with pytest.raises(
        UserError, match="hardest was not trained in .*, stage1, text_encoder was; run first: .*FILE is"
    ):
        images.from_run(workdir, "hardest")
    with pytest.raises(UserError, match="stage3 was not trained"):
        images.from_run(workdir, "hard", 0.5, None, True)
    with pytest.raises(UserError, match="stage2 was not trained"):
        images.from_run(workdir, "easy", 0.5, "up+normal", True)


def test_the_text_encoder_is_measured_with_what_there_is_of_the_curriculum(workdir: Path, base: Path) -> None:
    """Whatever rank the command says: that of the run counts."""
    config = tiny.config(base, "text_encoder", params="text_lora", pairs="stage1", lora_rank=7)
    models = measured.measured(config, workdir)
    assert list(models) == ["base", "easy", "text_encoder"]
    configs = {stage: stage_config(workdir, stage) for stage in ("stage1", "text_encoder")}
    (group,) = measured.groups(models, configs)
    drawing = measured.drawing_of(config, workdir, group, configs)
    (easy,) = images.from_run(workdir, "easy", 0.5, "all", False).policies
    (text,) = images.from_run(workdir, "text_encoder", 0.5).policies
    assert tree_hash(drawing.policies["easy"][0]) == tree_hash(easy)
    assert tree_hash(drawing.policies["text_encoder"][0]) == tree_hash(text)
    assert drawing.policies["base"] == [] and drawing.encoder is None


def test_a_stage_under_another_name_is_measured_beside_the_one_whose_pairs_it_has(workdir: Path, base: Path) -> None:
    config = tiny.config(base, "slow", pairs="stage1")
    write_json(workdir / "slow" / "config.json", to_json(config))
    assert list(measured.measured(config, workdir)) == ["base", "easy", "slow"]
    assert {("slow", "easy"), ("slow", "base"), ("hard", "base")} < {*measured.differing(config)}
    shutil.rmtree(workdir / "slow")


def test_only_the_up_blocks_act_for_the_blocks_up(workdir: Path) -> None:
    (policy,) = images.from_run(workdir, "easy", 1.0, "up", False).policies
    flat = [(path, float(abs(x[...]).sum())) for path, x in nnx.to_flat_state(policy) if path[-1] == "lora_B"]
    assert {("up_blocks" in path) == (size > 0) for path, size in flat} == {True}


def test_export_writes_the_text_encoder_and_the_recipe_too(workdir: Path, tmp_path: Path) -> None:
    export(workdir, tmp_path / "out", formats=["peft", "kohya"])
    written = {path.name for path in (tmp_path / "out").iterdir()}
    lora = {PEFT_FILE, KOHYA_FILE, PEFT_TEXT_FILE, KOHYA_TEXT_FILE, RECIPE_FILE}
    assert written == lora | {"README.md", "hgdpo.json"}
    export(workdir, tmp_path / "text", stage="text_encoder")
    assert (tmp_path / "text" / "text_encoder" / "model.safetensors").is_file()
    merged = pipelines.load_pipeline(tmp_path / "text").text.text_encoder
    untouched = pipelines.load_pipeline(stage_config(workdir, "stage1").model.base).text.text_encoder
    ids = jnp.array([[49406, 320, 49407]], jnp.int32)
    assert abs(merged(ids).last_hidden_state - untouched(ids).last_hidden_state).max() > 1e-4


def test_a_base_that_moved_is_given_to_export_and_sample(workdir: Path, base: Path, tmp_path: Path) -> None:
    run, moved, other = (tmp_path / name for name in ("run", "moved", "other"))
    shutil.copytree(workdir, run)
    for folder in (moved, other):
        shutil.copytree(base, folder)
    for stage in ("stage1", "text_encoder"):
        config = json.loads((run / stage / "config.json").read_text())
        config["model"]["base"] = str(tmp_path / "gone")
        write_json(run / stage / "config.json", config)
    line = "gone: no such folder or file; .* if it was moved, say where it is with --base"
    with pytest.raises(UserError, match=line):
        export(run, tmp_path / "out")
    with pytest.raises(UserError, match=line):
        images.from_run(run, None, 0.5, None, True)
    (other / "scheduler" / "scheduler_config.json").write_text('{"beta_schedule": "linear"}')
    with pytest.raises(UserError, match="content of model.base=sha256 .* stage1 in .* was made with sha256"):
        export(run, tmp_path / "out", base=str(other))
    assert not (tmp_path / "out").exists()
    source = images.from_run(run, None, 0.5, None, True, str(moved))
    assert source.settings["base"] == pipelines.base_hash(base)
    export(run, tmp_path / "out", formats=["peft"], base=str(moved))
    export(workdir, tmp_path / "out", formats=["peft"])  # the same by its content: kept
    with lock_for_all(tmp_path / "new"), pytest.raises(UserError, match="new: is being written by"):
        export(workdir, tmp_path / "new", formats=["peft"])


def test_a_batch_of_pictures_is_rounded_up_to_the_devices(base: Path) -> None:
    """The settings' defaults hold for sixteen devices as for a thousand."""
    settings = {"solver": "ddim", "steps": 2, "guidance": 1.0, "seed": 0}
    sampler = Sampler(pipelines.load_pipeline(base), tiny.mesh(data=8), batch=3, **settings)
    assert sampler.batch == 8
    assert sampler.encode(np.zeros((3, 32, 32, 3), np.float32), "").shape == (3, *tiny.LATENT)


def adapter_config(base: Path, folder: Path) -> ConfigDict:
    config = tiny.config(base, "personalise", steps=2, ema=0.5)
    config.train.objective, config.train.params = "sft", "adapter"
    config.data.resolutions = ("64x64",)
    config.data.photographs = str(tiny.write_photographs(folder / "photographs", train=9, heldout=3))
    config.data.update(caption_dropout=0.2, concept_dropout=0.2)
    config.pairs.update(winner="photograph", loser="none", batch=8, shard_size=9)
    config.adapter.image_encoder = str(tiny.write_scorer(folder / "clip"))
    config.train.lambda_stat = 0.0
    validate(config)
    return config


@pytest.mark.usefixtures("glance")
def test_an_adapter_is_trained_and_used_and_exported(base: Path, tmp_path: Path) -> None:
    config, workdir = adapter_config(base, tmp_path), tmp_path / "run"
    before = pipelines.base_hash(base)
    build.build(config, workdir)
    with pytest.raises(UserError, match="--concept: needs an IP-Adapter"):
        images.with_concept(images.from_checkpoint(str(base)), photograph(tmp_path), config.adapter, workdir)
    train(config, workdir)
    assert pipelines.base_hash(base) == before

    source = images.with_concept(images.from_checkpoint(str(base)), photograph(tmp_path), config.adapter, workdir)
    assert source.concept.shape == (1, 5, 8)  # 2 x 2 patches and the class token
    fresh = load_trainable(config, tiny.mesh())
    trained, start = (nnx.state(p.adapter, nnx.Param) for p in (source.pipeline, fresh))
    pairs_of_leaves = zip(*map(jax.tree.leaves, (trained, start)), strict=True)
    assert not any(np.array_equal(a, b) for a, b in pairs_of_leaves)

    export(workdir, tmp_path / "out", stage="personalise", formats=["peft"])
    read = ip_adapter.load(tmp_path / "out" / ADAPTER_FILE, source.pipeline.denoiser)
    for a, b in zip(jax.tree.leaves(nnx.state(read, nnx.Param)), jax.tree.leaves(trained), strict=True):
        np.testing.assert_array_equal(a, b)


def photograph(folder: Path) -> Path:
    return next((folder / "photographs" / "photographs").iterdir())
