"""Checkpoints as people have them: in shards, in half precision, and what is refused in one line."""

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as torch_save

from hgdpo_jax.diffusion import pipeline as pipelines
from hgdpo_jax.diffusion.source import open_source
from hgdpo_jax.models.architectures import SD15
from hgdpo_jax.models.convert import abstract, from_torch, shapes
from hgdpo_jax.models.weights import Weights, chosen, copy_model, open_folder, write_weights
from hgdpo_jax.run.errors import UserError
from tests import tiny
from tests.full.components import shrunken, torch_model, write_folder
from tests.full.original import single_file

CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
TO_K = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
SD15_KEYS = ("first_stage_model.a", "cond_stage_model.transformer.a")


@pytest.mark.parametrize("settings", [{}, {"variant": "fp16"}, {"max_shard_size": "20KB"}])
def test_a_folder_is_read_however_diffusers_wrote_it(tmp_path: Path, settings: dict) -> None:
    model = torch_model("vae", shrunken(SD15)["vae"], 0)
    model.save_pretrained(tmp_path, **settings)
    found = open_folder(tmp_path)
    assert (len(found.files) > 1) == ("max_shard_size" in settings)
    expected = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[key], value.numpy()) for key, value in expected.items())


@pytest.mark.parametrize("settings", [{}, {"variant": "fp16"}, {"max_shard_size": "20KB"},
                                      {"variant": "fp16", "max_shard_size": "20KB"}])  # fmt: skip
def test_a_folder_is_copied_however_diffusers_wrote_it(tmp_path: Path, settings: dict) -> None:
    model = torch_model("vae", shrunken(SD15)["vae"], 0)
    model.save_pretrained(tmp_path / "a", **settings)
    (tmp_path / "a" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    copy_model(tmp_path / "a", tmp_path / "b")
    copied = [path.name for path in (tmp_path / "b").iterdir()]
    assert "config.json" in copied and not any(".bin" in name for name in copied)
    found = type(model).from_pretrained(tmp_path / "b").state_dict()  # which asks for no variant
    assert all(torch.equal(found[key], value) for key, value in model.state_dict().items())


def test_full_precision_comes_first() -> None:
    stem = "diffusion_pytorch_model"
    assert chosen({f"{stem}.fp16.safetensors", f"{stem}.safetensors"}) == f"{stem}.safetensors"
    assert chosen({f"{stem}.fp16.safetensors", "model.safetensors.index.json"}) == "model.safetensors.index.json"
    assert chosen({f"{stem}.fp16.safetensors", f"{stem}.bin"}) == f"{stem}.fp16.safetensors"
    assert chosen({f"{stem}.bin"}) is None


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    torch_model("vae", shrunken(SD15)["vae"], 0).save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*-00002-of-*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(UserError, match=rf"{shard}: no such file; .*index.json names it"):
        open_folder(tmp_path)


def test_the_command_that_converts_a_pickle_works(tmp_path: Path) -> None:
    path = tmp_path / "my model.ckpt"
    torch.save({"state_dict": {"a.weight": torch.arange(3.0)}}, path)
    with pytest.raises(UserError) as error:
        open_source(str(path))
    assert "\n" not in str(error.value)
    command = shlex.split(str(error.value).partition("installed: ")[2])
    subprocess.run([sys.executable, *command[1:]], check=True)
    assert np.array_equal(Weights(path.with_suffix(".safetensors"))["a.weight"], [0, 1, 2])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lora_unet_mid_block_attentions_0.lora_down.weight": (4, 8)}, "is a LoRA, not a checkpoint"),
        ({"something.weight": (4, 8)}, "expected a Stable Diffusion 1.x or XL checkpoint"),
        ({CONV_IN: (320, 9, 3, 3)}, "its UNet takes 9 channels, as inpainting models do"),
        ({CONV_IN: (320, 4, 3, 3), "first_stage_model.a": (1,), "cond_stage_model.model.a": (1,)}, "is of 2.x"),
        ({**dict.fromkeys(SD15_KEYS, (1,)), CONV_IN: (320, 4, 3, 3), TO_K: (320, 1024)}, "reads text of width 1024"),
        ({CONV_IN: (320, 4, 3, 3)}, "is incomplete, it has no cond_stage_model.transformer"),
        (
            {**dict.fromkeys(SD15_KEYS[1:], (1,)), CONV_IN: (320, 4, 3, 3)},
            "holds no VAE; give one with --config",
        ),
        ({**dict.fromkeys(SD15_KEYS, (1,)), CONV_IN: (320, 4, 3, 3)}, f"is incomplete, it has no weight {TO_K}"),
    ],
)
def test_another_file_taken_for_a_checkpoint_is_refused(tmp_path: Path, keys: dict, message: str) -> None:
    path = tmp_path / "file.safetensors"
    save_file({key: np.zeros(shape, np.float32) for key, shape in keys.items()}, path)
    with pytest.raises(UserError, match=message) as error:
        open_source(str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("", "config key model.base: is empty"),
        ("nowhere/at/all", "no such folder or file; from the hub write owner/name@revision"),
        ("owner/name@main", "give the 40 characters of a commit"),
    ],
)
def test_what_is_not_there_is_named(base: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_source(base)


def test_a_truncated_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    save_file({CONV_IN: np.zeros((320, 4, 3, 3), np.float32)}, path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=rf"{path}: not a whole safetensors file"):
        open_source(str(path))


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    """A base that a test may change."""
    return Path(shutil.copytree(base, tmp_path / "base"))


def test_parts_of_different_models_are_refused(copy: Path) -> None:
    config = (copy / "unet" / "config.json").read_text()
    (copy / "unet" / "config.json").write_text(config.replace('"cross_attention_dim": 8', '"cross_attention_dim": 24'))
    with pytest.raises(UserError, match="text encoders give embeddings of width 8, its UNet reads 24"):
        open_source(str(copy))
    for channels, message in ((9, "9 channels, as inpainting models do; the latents"), (4, "4 channels, the latents")):
        (copy / "unet" / "config.json").write_text(config.replace('"in_channels": 8', f'"in_channels": {channels}'))
        with pytest.raises(UserError, match=f"its UNet takes {message} of its VAE have 8"):
            open_source(str(copy))


def test_another_vae_takes_the_place_of_the_checkpoints(base: Path, tmp_path: Path) -> None:
    other = tmp_path / "vae"
    tiny.save_model(tiny.random_model(tiny.AutoencoderKL, tiny.TINY_VAE, 9), other)
    found, own = pipelines.load_pipeline(base, vae=other).vae, pipelines.load_pipeline(base).vae
    expected = Weights(other / "diffusion_pytorch_model.safetensors")["decoder.conv_in.weight"].transpose(2, 3, 1, 0)
    assert np.array_equal(found.decoder.conv_in.kernel[...], expected)
    assert not np.array_equal(own.decoder.conv_in.kernel[...], expected)


def test_a_vae_file_in_the_original_layout_is_one_too(tmp_path: Path) -> None:
    configs = shrunken(SD15)
    write_folder(SD15, configs, tmp_path / "base")
    prefix = "first_stage_model."
    weights = {key.removeprefix(prefix): x for key, x in single_file(configs).items() if key.startswith(prefix)}
    save_file(weights | {"loss.logvar": np.zeros(())}, tmp_path / "vae.safetensors")
    found = pipelines.load_pipeline(tmp_path / "base", vae=tmp_path / "vae.safetensors").vae
    expected = weights["decoder.mid.attn_1.q.weight"][:, :, 0, 0].T
    assert np.array_equal(found.decoder.mid_block.attentions[0].to_q.kernel[...], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [("more", "weight extra.weight is superfluous"), ("less", "is missing"), ("lora", "holds a LoRA, not a model")],
)
def test_weights_that_do_not_fit_the_config_are_named(copy: Path, change: str, message: str) -> None:
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights = {key: np.array(value) for key, value in Weights(path).items()}
    if change == "more":
        weights["extra.weight"] = np.zeros(3, np.float32)
    elif change == "less":
        del weights["conv_in.bias"]
    else:
        weights = {"unet.mid_block.attentions.0.proj_in.lora_A.weight": np.zeros((4, 8), np.float32)}
    save_file(weights, path)
    with pytest.raises(UserError, match=message) as error:
        pipelines.load_pipeline(copy)
    assert f"{copy}, unet" in str(error.value)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("unet/config.json", lambda config: {"in_channels": 8}, "unet/config.json: has no cross_attention_dim"),
        ("text_encoder/config.json", lambda config: {"hidden_size": 8},
         r"text_encoder: weight encoder\.\S* is missing \(.*\); it does not fit its config\.json"),
        ("vae/config.json", lambda config: {"latent_channels": 8}, "vae/config.json: has no block_out_channels"),
        ("vae/config.json", lambda config: [config], "vae/config.json: not a JSON object"),
        ("scheduler/scheduler_config.json", lambda config: config | {"prediction_type": "sample"},
         "scheduler config prediction_type='sample': expects one of"),
    ],
)  # fmt: skip
def test_a_config_that_does_not_tell_enough_is_named(
    copy: Path, file: str, change: Callable[[dict], Any], message: str
) -> None:
    (copy / file).write_text(json.dumps(change(json.loads((copy / file).read_text()))))
    with pytest.raises(UserError, match=message) as error:
        pipelines.load_pipeline(copy)
    assert str(copy) in str(error.value) and "\n" not in str(error.value)


def test_a_file_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {"b": rng.standard_normal((3, 5)).T, "a.weight": rng.standard_normal(7), "scalar": np.asarray(2.5)}
    write_weights(tmp_path / "x.safetensors", tensors, "bfloat16")
    found = Weights(tmp_path / "x.safetensors")
    theirs = load_torch(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys() == theirs.keys()
    for key, value in tensors.items():
        assert found[key].shape == value.shape and np.array_equal(found[key], value.astype(found[key].dtype))
        assert np.array_equal(theirs[key].float().numpy(), found[key].astype(np.float32))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_with_nan_or_infinity_is_named(dtype: str, value: float, tmp_path: Path) -> None:
    tensors = {"whole": np.arange(3.0), "empty": np.zeros((0, 3)), "broken": np.array([[0.0, 1.0], [value, 0.0]])}
    write_weights(tmp_path / "x.safetensors", tensors, dtype)
    found = Weights(tmp_path / "x.safetensors")
    assert found["whole"].tolist() == [0, 1, 2] and found["empty"].shape == (0, 3)
    with pytest.raises(UserError, match=r"x\.safetensors: weight broken has NaN or infinity; the file is broken"):
        found["broken"]


@pytest.mark.parametrize(
    ("part", "file"),
    [("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model")],
)
def test_a_checkpoint_with_nan_is_refused(copy: Path, part: str, file: str) -> None:
    path = copy / part / f"{file}.safetensors"
    weights = {key: np.array(value) for key, value in Weights(path).items()}
    key = sorted(weights)[-1]
    weights[key].flat[-1] = np.nan
    save_file(weights, path)
    with pytest.raises(UserError, match=f"{path}: weight {key} has NaN"):
        pipelines.load_pipeline(copy)


def test_a_weight_that_float16_cannot_hold_is_named() -> None:
    config = tiny.TINY_VAE
    weights = {key: np.zeros(shape, np.float32) for key, shape in shapes(abstract(tiny.AutoencoderKL, config)).items()}
    weights["decoder.conv_in.bias"] += 1e6
    with pytest.raises(UserError, match=r"weight decoder\.conv_in\.bias is too large for float16; take bfloat16"):
        from_torch(weights, abstract(tiny.AutoencoderKL, config), dtype="float16")
    from_torch(weights, abstract(tiny.AutoencoderKL, config), dtype="bfloat16")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["model.safetensors", "model.CKPT", "weights.pkl", "model"])
def test_a_pickle_is_known_whatever_its_name(tmp_path: Path, name: str, zipped: bool) -> None:
    path = tmp_path / name
    torch.save({"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="is a pickle; convert it where PyTorch is installed") as error:
        open_source(str(path))
    assert shlex.split(str(error.value))[-1] not in ("", str(path))


EDM = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")


@pytest.mark.parametrize("key", EDM)
def test_a_single_file_of_edm_is_refused(tmp_path: Path, key: str) -> None:
    path = tmp_path / "file.safetensors"
    keys = {**dict.fromkeys(SD15_KEYS, (1,)), CONV_IN: (320, 4, 3, 3), TO_K: (320, 768), key: (4,)}
    save_file({name: np.zeros(shape, np.float32) for name, shape in keys.items()}, path)
    with pytest.raises(UserError, match=f"{path}: has {key}: trained by EDM, as Playground 2.5 and CosXL"):
        open_source(str(path))


@pytest.mark.parametrize(
    "name", ["EDMDPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler", "ScoreSdeVeScheduler", "MadeUp"]
)
@pytest.mark.parametrize("file", ["model_index.json", "scheduler/scheduler_config.json"])
def test_a_folder_with_a_scheduler_of_another_kind_is_refused(copy: Path, file: str, name: str) -> None:
    path = copy / file
    config = json.loads(path.read_text())
    if file == "model_index.json":  # whose class is the one that diffusers makes
        config["scheduler"] = ["diffusers", name]
    else:
        config["_class_name"] = name
        index = json.loads((copy / "model_index.json").read_text())
        (copy / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", name]}))
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"model {copy}: {name}"):
        open_source(str(copy))


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("unet", r"is no VAE \(UNet2DConditionModel\); expected the folder of an AutoencoderKL"),
        ("text_encoder", r"is no VAE \(CLIPTextModel\)"),
        (".", "is a whole checkpoint; give its VAE, .*vae"),
        ("tokenizer", r"has no config\.json"),
        ("nowhere", "no such file"),
        ("unet/diffusion_pytorch_model.safetensors", r"is no VAE, it has no weight encoder\.conv_in\.weight"),
        ("tiny", r"is no VAE \(AutoencoderTiny\)"),
        ("model_index.json", "not a whole safetensors file"),
    ],
)
def test_what_is_no_vae_is_named_with_its_setting(copy: Path, place: str, message: str) -> None:
    (copy / "tiny").mkdir()
    config = {"_class_name": "AutoencoderTiny", "block_out_channels": [64]}
    (copy / "tiny" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message) as error:
        open_source(str(copy), vae=str(copy / place))
    assert str(error.value).startswith(f"config key model.vae={copy / place}: ") and "\n" not in str(error.value)


def test_weights_in_8_bits_are_named_at_once(tmp_path: Path) -> None:
    torch_save({"a.weight": torch.zeros(2, 2).to(torch.float8_e4m3fn)}, tmp_path / "a.safetensors")
    with pytest.raises(
        UserError, match=r"a\.safetensors: is in 8 bits \(weight a\.weight has dtype F8_E4M3\); take the f"
    ):
        Weights(tmp_path / "a.safetensors")
