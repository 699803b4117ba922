"""DINOv2 against transformers'."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from PIL import Image

from hgdpo_jax.config import ASSETS
from hgdpo_jax.models.convert import abstract, from_torch
from hgdpo_jax.models.dinov2 import _MEAN, _STD, SIDE, Dinov2Model, dinov2_pixels
from hgdpo_jax.run.errors import UserError
from tests.models.parity import numpy_weights, ported, randomise, relative_error
from tests.rounding import NETWORK

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 70, "patch_size": 14}
# As published, and as transformers wrote it before its version 5.
OLD = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value", "o_proj": "output.dense"}


def published(key: str) -> str:
    for new, old in OLD.items():
        key = key.replace(f"attention.{new}", f"attention.{old}")
    return key


def test_the_class_token_is_transformers_where_positions_are_stretched() -> None:
    theirs = randomise(transformers.Dinov2Model(transformers.Dinov2Config(**TINY)))
    ours = ported(Dinov2Model, theirs.config.to_dict(), theirs)
    pixels = np.random.default_rng(0).standard_normal((2, 98, 98, 3), np.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(pixels.transpose(0, 3, 1, 2))).pooler_output
    found = nnx.jit(lambda model, x: model(x))(ours, pixels)
    assert relative_error(found, expected) <= NETWORK
    again = abstract(Dinov2Model, theirs.config.to_dict())
    from_torch({published(key): value for key, value in numpy_weights(theirs).items()}, again)
    assert np.array_equal(again.encoder.layer[1].attention.o_proj.kernel, ours.encoder.layer[1].attention.o_proj.kernel)


def test_pixels_are_those_of_dgm_eval_with_clean_resize() -> None:
    """Pillow's bicubic of each channel in float32, to a thousandth of a level."""
    photograph = Image.open(ASSETS / "portraits" / "photographs" / "000f.jpg").convert("RGB").crop((0, 0, 96, 70))
    pixels = np.asarray(photograph, np.float32)
    channels = [Image.fromarray(pixels[..., i]).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for i in range(3)]
    expected = (np.stack(channels, -1).clip(0, 255) / 255 - np.array(_MEAN)) / np.array(_STD)
    found = dinov2_pixels(jnp.asarray(pixels)[None] / 127.5 - 1.0)[0]
    assert np.abs(found - expected).max() <= 1e-3 / 255 / min(_STD)


@pytest.mark.parametrize(("key", "value"), [("use_swiglu_ffn", True), ("model_type", "vit")])
def test_what_is_not_computed_is_refused(key: str, value: object) -> None:
    with pytest.raises(UserError, match=f"DINOv2 config {key}={value!r}: not supported"):
        abstract(Dinov2Model, TINY | {key: value})
