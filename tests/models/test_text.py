"""What the UNet is conditioned on: SDXL's two encoders, the empty caption, a negative prompt."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from hgdpo_jax.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from hgdpo_jax.models.text import TextConditioner, both
from tests.models.test_clip import TEXT
from tests.rounding import NETWORK, assert_close
from tests.tiny import random_model

BEGIN, END, PAD_2 = 58, 59, 7
CONFIG, SIZE = TEXT | {"eos_token_id": END}, (32, 48)
EMPTY = (BEGIN, END, 1, 1, 1, 1)
IDS = jnp.asarray([[BEGIN, 3, 4, END, 1, 1], [BEGIN, 9, 9, 9, 9, END]], jnp.int32)
OTHER = jnp.asarray([[BEGIN, 3, 0, END, 5, END], [BEGIN, 2, 0, 0, END, PAD_2]], jnp.int32)
BOTH = both(np.asarray(IDS), np.asarray(OTHER))


@nnx.jit
def run(plain: TextConditioner, zeros: TextConditioner) -> tuple:
    """Two captions, the empty one three times, a negative prompt twice, and what the encoders give; two captions of
    other tokens to the second tokenizer."""
    first, second = plain.text_encoder(IDS), plain.text_encoder_2(IDS.at[0, 4:].set(PAD_2))
    single = plain(IDS, SIZE), plain.empty(3, SIZE), zeros.empty(3, SIZE), zeros.empty(2, SIZE, IDS[:1]), first, second
    return *single, plain(jnp.asarray(BOTH), SIZE), plain.text_encoder_2(OTHER)


def test_conditioning_of_xl() -> None:
    """It is the penultimate layers; the second encoder pads after the end; the empty caption may be zero."""
    encoders = random_model(CLIPTextModel, CONFIG, 0), random_model(CLIPTextModelWithProjection, CONFIG, 1)
    conditioners = (TextConditioner(*encoders, empty_ids=EMPTY, pad_2=PAD_2, zero_empty=zero) for zero in (False, True))
    (found, added), empty, zero, negative, first, second, (beside, pooled), other = run(*conditioners)
    assert_close(found, np.concatenate([first.hidden_states[-2], second.hidden_states[-2]], -1), NETWORK)
    assert_close(added["text_embeds"], second.pooled, NETWORK)
    assert_close(beside, np.concatenate([first.hidden_states[-2], other.hidden_states[-2]], -1), NETWORK)
    assert_close(pooled["text_embeds"], other.pooled, NETWORK)
    assert np.any(empty.encoder_hidden_states) and np.any(empty.added_cond["text_embeds"])
    assert not np.any(zero.encoder_hidden_states) and not np.any(zero.added_cond["text_embeds"])
    assert_close(negative.encoder_hidden_states, found[np.array([0, 0])], NETWORK)
    assert_close(negative.added_cond["text_embeds"], added["text_embeds"][np.array([0, 0])], NETWORK)
    for count, conditioning in ((3, empty), (3, zero), (2, negative)):
        assert conditioning.added_cond["time_ids"].tolist() == [[32, 48, 0, 0, 32, 48]] * count
