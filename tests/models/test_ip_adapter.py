"""IP-Adapters against diffusers': the projections, the UNet with an adapter, and the files both ways."""

import runpy
import shlex
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from diffusers import UNet2DConditionModel as TorchUNet
from diffusers.loaders import IPAdapterMixin
from diffusers.models import embeddings
from flax import nnx
from safetensors.numpy import save_file

from hgdpo_jax.models import ip_adapter
from hgdpo_jax.models.clip import CLIPVisionModelWithProjection
from hgdpo_jax.models.convert import abstract, from_torch, parameters, to_torch
from hgdpo_jax.models.lora import add_lora, lora_layers, to_peft
from hgdpo_jax.models.unet import UNet2DConditionModel
from hgdpo_jax.models.weights import Weights
from hgdpo_jax.run.errors import UserError
from tests import tiny
from tests.models.parity import ported, randomise, relative_error
from tests.rounding import NETWORK, assert_close

BACKBONES = {"sd15": tiny.TINY_UNET, "sdxl": tiny.TINY_XL}
FEATURES, SCALE, FILE = 6, 0.7, "adapter.safetensors"
THEIRS = {
    "ip_adapter": embeddings.ImageProjection,
    "ip_adapter_plus": embeddings.IPAdapterPlusImageProjection,
    "face_id": embeddings.IPAdapterFaceIDImageProjection,
}
Models = tuple[TorchUNet, UNet2DConditionModel]
VISION = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=16,
    patch_size=4,
    projection_dim=20,
    hidden_act="gelu",
)
RNG = np.random.default_rng(0)
PIXELS = RNG.standard_normal((2, 16, 16, 3), np.float32)


def pair_of_unets(config: dict) -> Models:
    theirs = randomise(TorchUNet.from_config(config))
    return theirs, ported(UNet2DConditionModel, dict(theirs.config), theirs)


@pytest.fixture(scope="module")
def unets() -> dict[str, Models]:
    return {name: pair_of_unets(config) for name, config in BACKBONES.items()}


@pytest.fixture(scope="module")
def sd15() -> UNet2DConditionModel:
    return abstract(UNet2DConditionModel, tiny.TINY_UNET)


def config_of(unet: UNet2DConditionModel, kind: str) -> dict:
    """A fresh adapter's, with as many tokens for every kind."""
    return ip_adapter.default_config(unet, kind, FEATURES) | {"tokens": 4}


def filled(unet: UNet2DConditionModel, kind: str) -> ip_adapter.IPAdapter:
    """An adapter whose parameters are all random, and neither zero nor one."""
    adapter, rng = abstract(ip_adapter.IPAdapter, config_of(unet, kind)), np.random.default_rng(1)

    def value(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        scale, offset = (1.0, 0.5) if len(leaf.shape) == 1 else (leaf.shape[-2] ** -0.5, 0.0)
        return jnp.asarray(offset + scale * rng.standard_normal(leaf.shape, np.float32))

    nnx.update(adapter, jax.tree.map(value, nnx.state(adapter)))
    return adapter


def features_of(kind: str) -> jax.Array:
    """Those of two images."""
    shape = (2, 9 if kind == "ip_adapter_plus" else 1, FEATURES)
    return jnp.asarray(np.random.default_rng(2).standard_normal(shape, np.float32))


def for_diffusers(kind: str, features: jax.Array) -> torch.Tensor:
    """With its axis of images: [b, 1, f] as it is, [b, m, f] to [b, 1, m, f]."""
    return torch.tensor(np.asarray(features[:, None] if kind == "ip_adapter_plus" else features))


def read_by_diffusers(theirs: TorchUNet, folder: Path) -> None:
    """Its pipelines' loader, without a pipeline."""
    loader = IPAdapterMixin()
    loader.unet = theirs
    loader.load_ip_adapter(str(folder), subfolder="", weight_name=FILE, image_encoder_folder=None)
    loader.set_ip_adapter_scale(SCALE)


@nnx.jit
def ours_with(unet: UNet2DConditionModel, image: ip_adapter.Memory, x, t, context, added) -> jax.Array:
    return unet(x, t, ip_adapter.join(unet.read_text(context), image, SCALE), added)


def compare(theirs: TorchUNet, ours: UNet2DConditionModel, adapter: ip_adapter.IPAdapter) -> float:
    """The relative error of the UNet with an adapter that diffusers has read."""
    rng, width, kind = np.random.default_rng(3), ours.config["cross_attention_dim"], adapter.config["kind"]
    x, t = rng.standard_normal((2, 4, 4, ours.config["in_channels"]), np.float32), np.array([3, 987], np.int32)
    context, features = rng.standard_normal((2, 7, width), np.float32), features_of(kind)
    added = {
        "text_embeds": rng.standard_normal((2, 20), np.float32),
        "time_ids": np.array([[64, 48, 0, 8, 64, 64], [512, 512, 0, 0, 512, 512]], np.float32),
    }
    with torch.no_grad():
        expected = theirs(
            torch.tensor(x.transpose(0, 3, 1, 2)),
            torch.tensor(t),
            torch.tensor(context),
            added_cond_kwargs={key: torch.tensor(value) for key, value in added.items()}
            | {"image_embeds": [for_diffusers(kind, features)]},
        ).sample
    return relative_error(ours_with(ours, adapter(features), x, t, context, added), expected)


@pytest.mark.parametrize(("backbone", "kind"), [*(("sd15", kind) for kind in ip_adapter.KINDS), ("sdxl", "ip_adapter")])
def test_the_unet_with_an_adapter_is_diffusers_and_so_is_its_projection(
    backbone: str, kind: str, unets: dict[str, Models], tmp_path: Path
) -> None:
    theirs, ours = unets[backbone]
    adapter = filled(ours, kind)
    ip_adapter.save(adapter, tmp_path / FILE)
    read_by_diffusers(theirs, tmp_path)
    projection = theirs.encoder_hid_proj.image_projection_layers[0]
    assert type(projection) is THEIRS[kind]
    features = features_of(kind)
    with torch.no_grad():
        expected = projection(for_diffusers(kind, features)[:, 0])
    assert relative_error(adapter.image_proj(features), expected) <= NETWORK
    assert compare(theirs, ours, adapter) <= NETWORK


def test_the_loras_of_a_unet_act_as_without_an_adapter(tmp_path: Path) -> None:
    one_level = {"block_out_channels": [8], "down_block_types": ["CrossAttnDownBlock2D"]}
    theirs, ours = pair_of_unets(tiny.TINY_UNET | one_level | {"up_block_types": ["CrossAttnUpBlock2D"]})
    adapter = filled(ours, "ip_adapter")
    ip_adapter.save(adapter, tmp_path / FILE)
    read_by_diffusers(theirs, tmp_path)
    add_lora(ours, 2, 4.0, nnx.Rngs(0))
    for layer in lora_layers(ours).values():
        layer.lora_B[...] = jnp.asarray(0.3 * RNG.standard_normal(layer.lora_B.shape), jnp.float32)
    theirs.load_lora_adapter({key: torch.tensor(value) for key, value in to_peft(ours).items()}, prefix="unet")
    assert compare(theirs, ours, adapter) <= NETWORK


@pytest.mark.parametrize("kind", ip_adapter.KINDS)
def test_a_file_is_read_as_it_was_written(kind: str, sd15: UNet2DConditionModel, tmp_path: Path) -> None:
    adapter = filled(sd15, kind)
    ip_adapter.save(adapter, tmp_path / FILE)
    found = ip_adapter.load(tmp_path / FILE, sd15)
    assert found.config == adapter.config and found.dtype == sd15.dtype
    ip_adapter.save(found, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / FILE).read_bytes()
    weights = Weights(tmp_path / FILE)
    for path, leaf in parameters(found).items():
        assert np.array_equal(leaf[...], parameters(adapter)[path][...])
    width = sd15.config["cross_attention_dim"]
    numbers = sorted({int(key.split(".")[1]) for key in weights if key.startswith("ip_adapter.")})
    assert numbers == list(range(1, 2 * len(sd15.transformer_blocks()), 2))
    assert weights.shape("ip_adapter.1.to_k_ip.weight") == (8, width)
    assert weights.shape(f"ip_adapter.{numbers[-1]}.to_v_ip.weight") == (16, width)  # the middle block's


def test_two_images_give_the_tokens_of_both(sd15: UNet2DConditionModel) -> None:
    for kind in ("ip_adapter", "face_id"):
        adapter, features = filled(sd15, kind), jnp.asarray(RNG.standard_normal((2, 3, FEATURES), np.float32))
        separate = [adapter.image_proj(features[:, i : i + 1]) for i in range(3)]
        assert_close(adapter.image_proj(features), np.concatenate(separate, axis=1), NETWORK)


def test_an_adapter_computes_in_the_dtype_of_its_unet(tmp_path: Path, sd15: UNet2DConditionModel) -> None:
    ip_adapter.save(filled(sd15, "face_id"), tmp_path / FILE)
    half = abstract(UNet2DConditionModel, tiny.TINY_UNET, jnp.bfloat16)
    memory = ip_adapter.load(tmp_path / FILE, half)(features_of("face_id"))
    joined = ip_adapter.join(memory, memory, jnp.float32(SCALE))
    assert {x.dtype for pairs in joined.values() for pair in pairs for x in pair} == {jnp.dtype(jnp.bfloat16)}


def test_a_fresh_adapter_starts_from_the_text() -> None:
    unet = tiny.random_model(UNet2DConditionModel, tiny.TINY_UNET, 0)
    adapter, other = (ip_adapter.fresh(unet, "face_id", FEATURES, nnx.Rngs(seed)) for seed in (0, 1))
    for name, block in unet.transformer_blocks().items():
        layer = adapter.by_name()[name]
        assert np.array_equal(layer.to_k_ip.kernel[...], block.attn2.to_k.kernel[...])
        assert np.array_equal(layer.to_v_ip.kernel[...], block.attn2.to_v.kernel[...])
        assert layer.to_k_ip.kernel[...] is not block.attn2.to_k.kernel[...]
    assert not np.allclose(*(x.image_proj.proj[0].kernel[...] for x in (adapter, other)))


@pytest.mark.parametrize(("kind", "tokens"), [("ip_adapter", 4), ("ip_adapter_plus", 16), ("face_id", 4)])
def test_each_kind_makes_as_many_tokens_as_the_published_ones(
    kind: str, tokens: int, sd15: UNet2DConditionModel
) -> None:
    adapter = abstract(ip_adapter.IPAdapter, ip_adapter.default_config(sd15, kind, FEATURES))
    found = nnx.eval_shape(lambda model, x: model.image_proj(x), adapter, features_of(kind))
    assert found.shape == (2, tokens, sd15.config["cross_attention_dim"])


@pytest.mark.parametrize(("text", "width", "heads"), [(768, 768, 12), (2048, 1280, 20)])
def test_the_sizes_of_a_resampler_are_the_published_ones(text: int, width: int, heads: int) -> None:
    unet = abstract(UNet2DConditionModel, tiny.TINY_UNET | {"cross_attention_dim": text})
    config = ip_adapter.default_config(unet, "ip_adapter_plus", 1280)
    assert (config["width"], config["heads"], config["depth"], config["tokens"]) == (width, heads, 4, 16)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path, Path]:
    """A CLIPModel, its folder, and that of its vision tower."""
    text = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=60)
    config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=20)
    whole, folder = randomise(transformers.CLIPModel(config)), tmp_path_factory.mktemp("encoders")
    whole.save_pretrained(folder / "whole")
    tower = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**VISION)).eval()
    tower.load_state_dict({key: value for key, value in whole.state_dict().items() if "vis" in key})
    tower.save_pretrained(folder / "tower")
    return tower, folder / "whole", folder / "tower"


def test_image_features_are_what_diffusers_reads_and_so_are_those_of_no_image(encoders) -> None:
    theirs, whole, tower = encoders
    with torch.no_grad():
        image, nothing = (
            theirs(torch.tensor(pixels.transpose(0, 3, 1, 2)), output_hidden_states=True)
            for pixels in (PIXELS, np.zeros_like(PIXELS))
        )
    expected = {
        "ip_adapter": (image.image_embeds[:, None], torch.zeros(2, 1, 20)),
        "ip_adapter_plus": (image.hidden_states[-2], nothing.hidden_states[-2]),
    }

    @nnx.jit
    def run(encoder: CLIPVisionModelWithProjection, pixels: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
        found = {kind: ip_adapter.image_features(encoder, kind, pixels) for kind in expected}
        return {kind: (features, ip_adapter.empty(kind, features, encoder)) for kind, features in found.items()}

    for folder in (whole, tower):
        for kind, (found, nothing) in run(ip_adapter.load_image_encoder(folder), PIXELS).items():
            features, empty = expected[kind]
            assert relative_error(found, features) <= NETWORK
            assert_close(nothing, empty, NETWORK)
    assert not np.any(ip_adapter.empty("face_id", features_of("face_id")))


def test_what_is_no_image_encoder_is_named(tmp_path: Path) -> None:
    config = transformers.CLIPTextConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, vocab_size=60)
    transformers.CLIPTextModel(config).save_pretrained(tmp_path)
    for content in (None, '{"vision_config": null}'):
        if content:
            (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match=rf"{tmp_path}: is not an image encoder; expected a folder of CLIPVision"):
            ip_adapter.load_image_encoder(tmp_path)


def test_features_and_kinds_that_do_not_fit_are_named(sd15: UNet2DConditionModel) -> None:
    with pytest.raises(UserError, match=f"reads image features of width {FEATURES}, not 5; take the image encoder"):
        filled(sd15, "ip_adapter")(jnp.zeros((2, 1, 5)))
    with pytest.raises(UserError, match="kind 'plus': expects one of ip_adapter, ip_adapter_plus, face_id"):
        ip_adapter.fresh(sd15, "plus", FEATURES, nnx.Rngs(0))
    with pytest.raises(UserError, match=r"this UNet's read \[8, 12\]"):
        ip_adapter.fresh(
            abstract(UNet2DConditionModel, tiny.TINY_UNET | {"cross_attention_dim": [8, 12]}), "face_id", 4, nnx.Rngs(0)
        )


def test_an_adapter_for_another_unet_is_named(tmp_path: Path, sd15: UNet2DConditionModel) -> None:
    xl = abstract(UNet2DConditionModel, tiny.TINY_XL)
    ip_adapter.save(filled(xl, "ip_adapter_plus"), tmp_path / FILE)
    message = (
        rf"{tmp_path / FILE}: is for another UNet: it has 12 cross-attentions \(16 wide\) for tokens of width 20, "
        r"this UNet has 4 cross-attentions \(8, 16 wide\) for text of width 8"
    )
    with pytest.raises(UserError, match=message):
        ip_adapter.load(tmp_path / FILE, sd15)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ip_adapter.0.to_q_lora.down.weight": (4, 8)}, "LoRA inside (ip_adapter.0.to_q_lora.down.weight, 1 weights"),
        ({"image_proj.proj.3.weight": (8,)}, "is a Full-Face or FaceID-Plus adapter, not supported"),
        ({"image_proj.perceiver_resampler.proj_in.weight": (8, 8)}, "is a Full-Face or FaceID-Plus adapter"),
        ({"image_proj.proj.weight": None}, "is not an IP-Adapter; expected weights named image_proj."),
        ({"image_proj.norm.weight": None}, "weight image_proj.norm.weight is missing"),
        ({"ip_adapter.1.to_v_ip.weight": None}, "weight ip_adapter.1.to_v_ip.weight is missing"),
        ({"extra": (1,)}, "weight extra is superfluous"),
    ],
)
def test_another_file_taken_for_an_adapter_is_refused(
    tmp_path: Path, sd15: UNet2DConditionModel, change: dict, message: str
) -> None:
    path = tmp_path / FILE
    weights = to_torch(filled(sd15, "ip_adapter"))
    weights |= {key: shape and np.zeros(shape, np.float32) for key, shape in change.items()}
    save_file({key: np.ascontiguousarray(value) for key, value in weights.items() if value is not None}, path)
    with pytest.raises(UserError) as error:
        ip_adapter.load(path, sd15)
    assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_the_command_that_converts_a_pickle_writes_what_is_read(
    tmp_path: Path, sd15: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = filled(sd15, "face_id")
    nested: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in to_torch(adapter).items():
        part, _, rest = key.partition(".")
        nested[part][rest] = torch.tensor(value)
    path = tmp_path / "ip adapter.bin"
    torch.save(nested, path)
    with pytest.raises(UserError) as error:
        ip_adapter.load(path, sd15)
    _, *command = shlex.split(str(error.value).partition("installed: ")[2])
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(command[0], run_name="__main__")
    found = ip_adapter.load(path.with_suffix(".safetensors"), sd15)
    expected = abstract(ip_adapter.IPAdapter, adapter.config)
    from_torch(to_torch(adapter), expected)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, nnx.state(found), nnx.state(expected))))
