"""A LoRA file of any kind, merged while the base is read, makes the model that it makes elsewhere."""

import json
import re
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from flax import nnx
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.numpy import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from hgdpo_jax.diffusion import pipeline as pipelines
from hgdpo_jax.diffusion.source import open_source
from hgdpo_jax.diffusion.stable_diffusion import STABLE_DIFFUSION
from hgdpo_jax.models.convert import load_model, to_torch
from hgdpo_jax.models.lora import add_lora, lora_layers
from hgdpo_jax.models.weights import open_folder
from hgdpo_jax.run.errors import UserError
from tests import tiny
from tests.rounding import EPS, assert_close


class Taught(NamedTuple):
    """A base on disk; the same with a LoRA in UNet and text encoders that does something, alpha half the rank; and the
    weights of each part with that merged."""

    base: Path
    models: dict[str, nnx.Module]
    merged: dict[str, dict[str, np.ndarray]]


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def taught(request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Taught:
    if request.param == "sdxl":
        base = tiny.write_sdxl(tmp_path_factory.mktemp("base"))
    configs, merged, models, rng = open_source(str(base)).configs, {}, {}, np.random.default_rng(0)
    for name in configs:
        if name == "vae":
            continue
        model = models[name] = load_model(STABLE_DIFFUSION.models[name], base / name)
        add_lora(model, 4, 2.0, nnx.Rngs(0))
        merged[name] = to_torch(model)
        for path, layer in lora_layers(model).items():
            a, b = (0.1 * rng.standard_normal(x.shape, np.float32) for x in (layer.lora_A, layer.lora_B))
            layer.lora_A[...], layer.lora_B[...] = jnp.asarray(a), jnp.asarray(b)
            merged[name][f"{path}.weight"] = merged[name][f"{path}.weight"] + 0.5 * (a @ b).T
    return Taught(base, models, merged)


def older(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """PEFT's names as diffusers wrote them in 2023, LoRA in the attention processors."""
    found = {}
    for key, value in weights.items():
        key = re.sub(r"\.(to_[qkv]|to_out)(\.0)?\.lora_", r".processor.\1_lora.", key) if key[:4] == "unet" else key
        key = key.replace("_proj.lora_", "_proj.lora_linear_layer.")
        found[key.replace(".A.", ".down.").replace(".B.", ".up.")] = value
    return found


def before_0_19(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As above, and the text encoders' as they were named first."""
    found = {}
    for key, value in older(weights).items():
        for new, old in (("out_proj", "to_out"), ("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v")):
            key = key.replace(f"{new}.lora_linear_layer.", f"{old}_lora.")
        if key.startswith("text") and ".text_model." not in key:
            key = key.replace(".encoder.", ".text_model.encoder.")
        found[key] = value
    return found


def named(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """PEFT's names with that of the adapter."""
    return {re.sub(r"(lora_[AB])\.", r"\1.default.", key): value for key, value in weights.items()}


def alphas_of_shape_1(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key: value.reshape(1) if key.endswith("alpha") else value for key, value in weights.items()}


CHANGES = {"older": older, "before 0.19": before_0_19, "named": named, "alphas of shape 1": alphas_of_shape_1}


@pytest.mark.parametrize("kind", ["peft", "kohya", *CHANGES])
def test_it_is_the_model_with_the_lora_merged(taught: Taught, tmp_path: Path, kind: str) -> None:
    layout = STABLE_DIFFUSION.layout(taught.models, {})
    weights = layout.lora_weights(taught.models, "kohya" if kind in ("kohya", "alphas of shape 1") else "peft")
    changed = CHANGES.get(kind, dict)(weights)
    assert (kind in ("peft", "kohya")) == (
        changed.keys() == weights.keys() and all(value.shape == weights[key].shape for key, value in changed.items())
    )
    save_file(changed, tmp_path / "lora.safetensors")
    source = open_source(str(taught.base), lora=str(tmp_path / "lora.safetensors"))
    for name, expected in taught.merged.items():
        model, before = source.open(name, list(expected)), open_folder(taught.base / name)
        assert any(np.abs(model[key] - before[key]).max() > 0.01 for key in expected)
        for key, value in expected.items():
            assert_close(model[key], value, 8 * EPS * max(1.0, np.abs(value).max()))


def test_a_lora_changes_the_hash_of_the_base(base: Path, tmp_path: Path) -> None:
    width = load_file(base / "unet" / "diffusion_pytorch_model.safetensors")[f"{TO_Q[5:]}.weight"].shape[0]
    zeros = {"A": np.zeros((2, width), np.float32), "B": np.zeros((width, 2), np.float32)}
    save_file({f"{TO_Q}.lora_{x}.weight": value for x, value in zeros.items()}, tmp_path / "lora.safetensors")
    assert pipelines.base_hash(base) != pipelines.base_hash(base, lora=tmp_path / "lora.safetensors")


def unet_weights(base: Path, lora: Path, key: str) -> np.ndarray:
    """A weight of the UNet with a LoRA merged."""
    return open_source(str(base), lora=str(lora)).open("unet", [key])[key]


def test_diffusers_alpha_is_read_from_its_metadata(base: Path, tmp_path: Path) -> None:
    theirs = StableDiffusionPipeline.from_pretrained(base, dtype=torch.float32)
    theirs.unet.add_adapter(LoraConfig(r=4, lora_alpha=12, target_modules=["to_q", "to_out.0"]))
    with torch.no_grad():
        for name, parameter in theirs.unet.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path / "lora",
        unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(theirs.unet)),
        **_collate_lora_metadata({"unet": theirs.unet}),
    )
    (file,) = (tmp_path / "lora").glob("*.safetensors")
    theirs.unet.fuse_lora()
    key = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    found = unet_weights(base, file, f"{key}.weight")
    expected = dict(theirs.unet.named_parameters())[f"{key}.base_layer.weight"].detach().numpy()
    assert_close(found, expected, 8 * EPS)


def test_pefts_own_file_has_its_alpha_beside_it_and_kohyas_convolutions_are_merged(base: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    before = load_file(base / "unet" / "diffusion_pytorch_model.safetensors")
    key = "down_blocks.0.resnets.0.conv1"
    outputs, inputs = before[f"{key}.weight"].shape[:2]
    down = rng.standard_normal((2, inputs, 3, 3)).astype(np.float32)
    up = rng.standard_normal((outputs, 2, 1, 1)).astype(np.float32)
    change = np.einsum("or,rihw->oihw", up[:, :, 0, 0], down)
    name = f"lora_unet_{key}".replace(".", "_")
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": HALF},
              tmp_path / "kohya.safetensors")  # fmt: skip
    found = unet_weights(base, tmp_path / "kohya.safetensors", f"{key}.weight")
    assert_close(found, before[f"{key}.weight"] + 0.25 * change, 100 * EPS)

    key = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    outputs, inputs = before[f"{key}.weight"].shape
    down, up = rng.standard_normal((2, inputs)).astype(np.float32), rng.standard_normal((outputs, 2)).astype(np.float32)
    save_file({f"base_model.model.{key}.lora_A.weight": down, f"base_model.model.{key}.lora_B.weight": up},
              tmp_path / "adapter_model.safetensors")  # fmt: skip
    settings, hashes = {"r": 2, "target_modules": ["to_k"]}, set()
    for alpha in (6, 8):
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": alpha}))
        found = unet_weights(base, tmp_path / "adapter_model.safetensors", f"{key}.weight")
        assert_close(found, before[f"{key}.weight"] + alpha / 2 * up @ down, 100 * EPS)
        hashes.add(pipelines.base_hash(base, lora=tmp_path / "adapter_model.safetensors"))
    assert len(hashes) == 2  # the base is another one


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_sdxl(tmp_path_factory.mktemp("xl"))


THEIRS = {
    "unet": (UNet2DConditionModel, ["to_q", "to_out.0", "conv1", "proj_in"]),
    "text_encoder": (CLIPTextModel, ["q_proj", "fc1"]),
    "text_encoder_2": (CLIPTextModelWithProjection, ["out_proj", "text_projection"]),
}


@pytest.mark.parametrize("part", THEIRS)
@pytest.mark.parametrize("place", ["adapter_model.safetensors", "mine.safetensors", "."])
def test_pefts_own_file_of_each_network_is_read_with_its_alpha(part: str, place: str, xl: Path, tmp_path: Path) -> None:
    """Under its own name, another, and as the folder."""
    cls, targets = THEIRS[part]
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=targets, init_lora_weights=False)
    theirs = get_peft_model(cls.from_pretrained(xl / part), config)
    theirs.save_pretrained(tmp_path)
    if place != ".":
        (tmp_path / "adapter_model.safetensors").rename(tmp_path / place)
    expected = {key: value.numpy() for key, value in theirs.merge_and_unload().state_dict().items()}
    before = open_folder(xl / part)
    found = open_source(str(xl), lora=str(tmp_path / place)).open(part, list(before))
    changed = 0
    for key, value in before.items():
        theirs_too = expected[key] if key in expected else expected[key.removeprefix("text_model.")]
        assert_close(found[key], theirs_too, 16 * EPS * max(1.0, np.abs(theirs_too).max()))
        changed += bool(np.abs(found[key] - value).max() > 0.01)
    assert changed >= len(targets)


def test_kohyas_projection_of_the_second_encoder_is_merged(xl: Path, tmp_path: Path) -> None:
    down, up = np.ones((1, 12), np.float32), np.ones((20, 1), np.float32)
    name = "lora_te2_text_projection"
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": HALF},
              tmp_path / "lora.safetensors")  # fmt: skip
    key = "text_projection.weight"
    found = open_source(str(xl), lora=str(tmp_path / "lora.safetensors")).open("text_encoder_2", [key])[key]
    assert_close(found, open_folder(xl / "text_encoder_2")[key] + 0.5, 8 * EPS)


HALF = np.asarray(0.5, np.float32)
TO_Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"conv_in.weight": (8, 4, 3, 3)}, "is not a LoRA; expected a LoRA of this model's linear layers"),
        ({f"{TO_Q}.lora_A.weight": (2, 16), f"{TO_Q}.lora_B.weight": (16, 2), f"{TO_Q}.dora_scale": (16,)},
         r"has unet\.\S*dora_scale \(1 in all\)"),
        ({f"{TO_Q}.lora_A.weight": (2, 640), f"{TO_Q}.lora_B.weight": (640, 2)}, "it is of another model"),
    ],
)  # fmt: skip
def test_what_cannot_be_merged_is_named(base: Path, tmp_path: Path, weights: dict, message: str) -> None:
    width = load_file(base / "unet" / "diffusion_pytorch_model.safetensors")[f"{TO_Q[5:]}.weight"].shape[0]
    shapes = {key: tuple(width if side == 16 else side for side in shape) for key, shape in weights.items()}
    save_file({key: np.zeros(shape, np.float32) for key, shape in shapes.items()}, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=message) as error:
        dict(open_source(str(base), lora=str(tmp_path / "lora.safetensors")).open("unet", [f"{TO_Q[5:]}.weight"]))
    assert str(tmp_path / "lora.safetensors") in str(error.value) and "\n" not in str(error.value)


A, B = f"{TO_Q}.lora_A.weight", f"{TO_Q}.lora_B.weight"


def pair(base: Path, prefix: str = "unet.") -> dict[str, np.ndarray]:
    """A LoRA of rank 2 for one layer."""
    width = open_folder(base / "unet").shape(f"{TO_Q[5:]}.weight")[0]
    return {A.replace("unet.", prefix): np.ones((2, width), np.float32),
            B.replace("unet.", prefix): np.ones((width, 2), np.float32)}  # fmt: skip


@pytest.mark.parametrize(
    ("more", "metadata", "message"),
    [
        ({}, {}, "holds no tensors"),
        ({f"{TO_Q}.alpha": np.ones(2, np.float32)}, {}, r"alpha is \(2,\); expected one number"),
        ({B: np.full((8, 2), np.nan, np.float32)}, {}, f"weight {B} has NaN or infinity"),
        ({B: np.full((8, 2), -np.inf, np.float32)}, {}, f"weight {B} has NaN or infinity"),
        ({A: np.ones((0, 8), np.float32), B: np.ones((8, 0), np.float32)}, {}, "it is of another model"),
        ({B: np.ones((8, 3), np.float32)}, {}, "it is of another model"),
        ({A: np.ones((8,), np.float32)}, {}, "it is of another model"),
        ({f"{TO_Q}.lora.down.weight": np.ones((2, 8), np.float32)}, {}, r"has unet\S+ \(1 in all\)"),
        ({"alpha": HALF}, {}, r"has alpha \(1 in all\)"),
        ({A: np.ones((2, 8), np.float32)}, {"lora_adapter_metadata": "{"}, "lora_adapter_metadata is not JSON"),
        ({A: np.ones((2, 8), np.float32)}, {"lora_adapter_metadata": "[]"}, "lora_adapter_metadata is no JSON object"),
        ({A: np.ones((2, 8), np.float32)}, {"lora_adapter_metadata": '{"unet.lora_alpha": null}'}, "expected a number"),
        ({A: np.ones((2, 8), np.float32)}, {"lora_adapter_metadata": '{"unet.lora_alpha": NaN}'}, "expected a number"),
        ({A: np.ones((2, 8), np.float32)}, {"lora_adapter_metadata": '{"unet.use_rslora": true}'},
         "was trained with use_rslora=True, which is not supported"),
    ],
)  # fmt: skip
def test_a_lora_that_is_broken_is_refused(base: Path, tmp_path: Path, more: dict, metadata: dict, message: str) -> None:
    width = open_folder(base / "unet").shape(f"{TO_Q[5:]}.weight")[0]
    resized = {key: np.resize(x, [width if side == 8 else side for side in x.shape]) for key, x in more.items()}
    path = tmp_path / "lora.safetensors"
    save_file(pair(base) | resized if more else {}, path, metadata or None)
    with pytest.raises(UserError, match=message) as error:
        dict(open_source(str(base), lora=str(path)).open("unet", [f"{TO_Q[5:]}.weight"]))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (None, "its scale stands in adapter_config.json; put that file beside it"),
        ({"lora_alpha": 4, "use_dora": True}, "was trained with use_dora=True"),
        ({"lora_alpha": 4, "alpha_pattern": {"to_q": 8}}, "was trained with alpha_pattern="),
        ({"lora_alpha": 4, "init_lora_weights": "pissa_niter_4"}, "was trained with init_lora_weights='pissa_niter_4'"),
        ({"lora_alpha": "4"}, "its lora_alpha is '4'; expected a number"),
        ([], "not a JSON object"),
    ],
)
def test_what_pefts_settings_say_is_not_passed_over(
    base: Path, tmp_path: Path, settings: dict | None, message: str
) -> None:
    save_file(pair(base, "base_model.model."), tmp_path / "mine.safetensors")
    if settings is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=message):
        open_source(str(base), lora=str(tmp_path / "mine.safetensors"))


def test_pefts_file_of_another_model_is_refused(base: Path, tmp_path: Path) -> None:
    weights = {"base_model.model.x.lora_A.weight": (2, 8), "base_model.model.x.lora_B.weight": (8, 2)}
    path = tmp_path / "adapter_model.safetensors"
    save_file({key: np.ones(shape, np.float32) for key, shape in weights.items()}, path)
    with pytest.raises(UserError, match=r"fits none of unet, text_encoder; expected PEFT's file"):
        open_source(str(base), lora=str(path))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"is a folder with no \.safetensors file; give the file"),
        (["a", "b"], r"is a folder with a\.safetensors, b\.safetensors; give the file"),
        (["adapter_model", "pytorch_lora_weights"], "is a folder with adapter_model"),
    ],
)
def test_a_folder_is_refused_unless_it_holds_one_lora(
    base: Path, tmp_path: Path, files: list[str], message: str
) -> None:
    for name in files:
        save_file(pair(base), tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match=message):
        open_source(str(base), lora=str(tmp_path))


@pytest.mark.parametrize("files", [["any"], ["pytorch_lora_weights", "other"], ["adapter_model", "optimizer"]])
def test_the_lora_of_a_folder_is_found(base: Path, tmp_path: Path, files: list[str]) -> None:
    for name in files:
        save_file(pair(base) if name == files[0] else {"x": HALF}, tmp_path / f"{name}.safetensors")
    key = f"{TO_Q[5:]}.weight"
    assert_close(unet_weights(base, tmp_path, key), open_folder(base / "unet")[key] + 2, 8 * EPS)


def test_a_pickled_lora_is_refused(base: Path, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "lora.pt")
    with pytest.raises(UserError, match=r"lora\.pt: is a pickle; convert it"):
        open_source(str(base), lora=str(tmp_path / "lora.pt"))
