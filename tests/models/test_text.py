"""What the UNet is conditioned on: SDXL's two encoders, the empty caption, a negative prompt."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hgdpo_jax.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from hgdpo_jax.models.text import TextConditioner
from tests.models.test_clip import TEXT
from tests.rounding import NETWORK, assert_close
from tests.tiny import random_model

BEGIN, END, PAD_2 = 58, 59, 7
CONFIG, SIZE = TEXT | {"eos_token_id": END}, (32, 48)
EMPTY = (BEGIN, END, 1, 1, 1, 1)
IDS = jnp.asarray([[BEGIN, 3, 4, END, 1, 1], [BEGIN, 9, 9, 9, 9, END]], jnp.int32)
Encoders = tuple[CLIPTextModel, CLIPTextModelWithProjection]


@pytest.fixture(scope="module")
def encoders() -> Encoders:
    return random_model(CLIPTextModel, CONFIG, 0), random_model(CLIPTextModelWithProjection, CONFIG, 1)


@nnx.jit
def run(conditioner: TextConditioner) -> tuple:
    """Two captions, the empty one three times, a negative prompt twice, and what the encoders give."""
    first, second = conditioner.text_encoder(IDS), conditioner.text_encoder_2(IDS.at[0, 4:].set(PAD_2))
    empty, negative = conditioner.empty(3, SIZE), conditioner.empty(2, SIZE, IDS[:1])
    return conditioner(IDS, SIZE), empty, negative, first, second


@pytest.mark.parametrize("zero", [False, True])
def test_conditioning_of_xl(encoders: Encoders, zero: bool) -> None:
    """It is the penultimate layers; the second encoder pads after the end; the empty caption may be zero."""
    conditioner = TextConditioner(*encoders, empty_ids=EMPTY, pad_2=PAD_2, zero_empty=zero)
    (found, added), empty, negative, first, second = run(conditioner)
    assert_close(found, np.concatenate([first.hidden_states[-2], second.hidden_states[-2]], -1), NETWORK)
    assert_close(added["text_embeds"], second.pooled, NETWORK)
    assert np.any(empty.encoder_hidden_states) == np.any(empty.added_cond["text_embeds"]) == (not zero)
    assert_close(negative.encoder_hidden_states, found[np.array([0, 0])], NETWORK)
    assert_close(negative.added_cond["text_embeds"], added["text_embeds"][np.array([0, 0])], NETWORK)
    for count, conditioning in ((3, empty), (2, negative)):
        assert conditioning.added_cond["time_ids"].tolist() == [[32, 48, 0, 0, 32, 48]] * count
