"""CLIP against transformers'."""

import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from hgdpo_jax.models import clip
from hgdpo_jax.models.clip import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection
from hgdpo_jax.models.convert import abstract, from_torch, to_torch
from hgdpo_jax.run.errors import UserError
from tests.models.parity import numpy_weights, ported, randomise, relative_error
from tests.rounding import NETWORK

TEXT = dict(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=12,
    projection_dim=20,
    bos_token_id=58,
    pad_token_id=1,
)
VISION = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4
)
run = nnx.jit(lambda model, x: model(x))
IDS = np.array([[58, 3, 4, 59, 1, 1, 1, 1], [58, 9, 9, 9, 9, 9, 9, 59]], np.int32)


@pytest.mark.parametrize(("act", "eos"), [("quick_gelu", 2), ("gelu", 59)])
def test_the_text_model_is_transformers(act: str, eos: int) -> None:
    theirs = randomise(
        transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT, hidden_act=act, eos_token_id=eos))
    )
    ours = ported(CLIPTextModel, theirs.config.to_dict(), theirs)
    with torch.no_grad():
        expected = theirs(torch.tensor(IDS), output_hidden_states=True)
    found = run(ours, IDS)
    assert relative_error(found.last_hidden_state, expected.last_hidden_state) <= NETWORK
    assert relative_error(found.pooled, expected.pooler_output) <= NETWORK
    assert relative_error(found.hidden_states[-2], expected.hidden_states[-2]) <= NETWORK


def test_the_projected_text_model_is_transformers() -> None:
    config = transformers.CLIPTextConfig(**TEXT, eos_token_id=59)
    theirs = randomise(transformers.CLIPTextModelWithProjection(config))
    ours = ported(CLIPTextModelWithProjection, theirs.config.to_dict(), theirs)
    with torch.no_grad():
        expected = theirs(torch.tensor(IDS)).text_embeds
    assert relative_error(run(ours, IDS).pooled, expected) <= NETWORK


def test_the_projected_vision_model_is_transformers() -> None:
    config = transformers.CLIPVisionConfig(**VISION, projection_dim=20, hidden_act="gelu")
    theirs = randomise(transformers.CLIPVisionModelWithProjection(config))
    ours = ported(CLIPVisionModelWithProjection, theirs.config.to_dict(), theirs)
    pixels = np.random.default_rng(0).standard_normal((2, 16, 16, 3), np.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(pixels.transpose(0, 3, 1, 2)), output_hidden_states=True)
    found = run(ours, pixels)
    assert relative_error(found.pooled, expected.image_embeds) <= NETWORK
    assert relative_error(found.last_hidden_state, expected.last_hidden_state) <= NETWORK
    assert len(found.hidden_states) == len(expected.hidden_states) == 3
    assert relative_error(found.hidden_states[-2], expected.hidden_states[-2]) <= NETWORK


def test_both_towers_are_transformers() -> None:
    config = transformers.CLIPConfig(text_config=TEXT | {"eos_token_id": 59}, vision_config=VISION, projection_dim=20)
    theirs = randomise(transformers.CLIPModel(config))
    ours = ported(CLIPModel, theirs.config.to_dict(), theirs)
    pixels = np.random.default_rng(0).standard_normal((2, 16, 16, 3), np.float32)
    with torch.no_grad():
        result = theirs(input_ids=torch.tensor(IDS), pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2)))
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    image, text = nnx.jit(lambda m, x, ids: (m.image_embeds(x), m.text_embeds(ids)))(ours, pixels, IDS)
    assert relative_error(unit(image), result.image_embeds) <= NETWORK
    assert relative_error(unit(text), result.text_embeds) <= NETWORK
    logits = np.exp(ours.logit_scale[...]) * unit(image) @ unit(text).T
    assert relative_error(logits, result.logits_per_image) <= NETWORK


@pytest.mark.parametrize(
    ("cls", "name"), [(transformers.CLIPTextConfig, "text"), (transformers.CLIPVisionConfig, "vision")]
)
def test_what_a_config_leaves_out_is_what_transformers_takes(cls: type, name: str) -> None:
    known = clip._tower({f"{name}_config": {}}, name, {"text": clip._TEXT, "vision": clip._VISION}[name])
    assert known.items() <= cls().to_dict().items()


def test_a_config_that_has_a_tower_twice_is_read_as_transformers_reads_it() -> None:
    older = {
        "text_config": dict(TEXT),
        "text_config_dict": {"hidden_act": "gelu", "hidden_size": 64},
        "projection_dim": 6,
    }
    found = clip._tower(older, "text", clip._TEXT)
    theirs = transformers.CLIPConfig(**older).text_config.to_dict()
    assert {key: found[key] for key in clip._TEXT} == {key: theirs[key] for key in clip._TEXT}


@pytest.mark.parametrize("kind", ["siglip", "blip", "chinese_clip"])
def test_models_of_other_kinds_are_refused(kind: str) -> None:
    config = {"model_type": kind, "text_config": TEXT, "vision_config": VISION, "projection_dim": 6}
    with pytest.raises(UserError, match=f"CLIP config model_type='{kind}': not supported, only 'clip' is"):
        abstract(CLIPModel, config)
    with pytest.raises(UserError, match="CLIP text config model_type"):
        abstract(CLIPTextModel, TEXT | {"model_type": f"{kind}_text_model"})


@pytest.mark.parametrize(
    "beside", ["text_projection.weight", "logit_scale", "visual_projection.weight", "vision_model.x"]
)
def test_what_clip_has_beside_a_tower_is_passed_over_and_nothing_else(beside: str) -> None:
    config = transformers.CLIPTextConfig(**TEXT)
    weights = numpy_weights(transformers.CLIPTextModel(config))
    from_torch(weights | {beside: np.zeros(3, np.float32)}, abstract(CLIPTextModel, config.to_dict()))
    for key in ("encoder.layers.7.layer_norm1.weight", "extra.weight"):
        with pytest.raises(UserError, match=f"weight {key} is superfluous"):
            from_torch(weights | {key: np.zeros(3, np.float32)}, abstract(CLIPTextModel, config.to_dict()))


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_keys_with_and_without_the_old_prefix_are_read(prefix: str) -> None:
    config = transformers.CLIPTextConfig(**TEXT)
    theirs = randomise(transformers.CLIPTextModel(config))
    bare = {key.removeprefix("text_model."): value for key, value in numpy_weights(theirs).items()}
    weights = {prefix + key: value for key, value in bare.items()}
    ours = nnx.eval_shape(lambda: CLIPTextModel(config.to_dict(), rngs=nnx.Rngs(0)))
    from_torch(weights, ours)
    written = to_torch(ours)
    assert written.keys() == bare.keys() and all(np.array_equal(written[k], bare[k]) for k in bare)
