"""ImageReward (Xu et al. 2023): BLIP reads picture and caption together, and a head rates what it makes of them."""

import re
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from transformers import BertTokenizer, CLIPTokenizer

from hgdpo_jax.models.blip import BLIP
from hgdpo_jax.models.preprocessing import clip_pixels
from hgdpo_jax.models.rating import Rating
from hgdpo_jax.models.text import of_clip
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.scoring.preference import CLIP_TOKENIZER, Judgement, TokenIds

_TOKENS = 35
_MEAN, _DEVIATION = 0.16717362830052426, 1.0333394966054072  # of the ratings that it was trained with


def image_reward(blip: BLIP, head: Rating, images: Float[Array, "b H W 3"], ids: Int[Array, "b t"]) -> Judgement:
    """The reward of images in [-1, 1] for the captions whose ids BERT's tokenizer gives: about 0 ± 1."""
    state = blip(clip_pixels(images, blip.config["image_size"]), ids)
    return Judgement((head(state) - _MEAN) / _DEVIATION)


def reader(vocabulary: Path) -> Callable[[TokenIds], Int[np.ndarray, "b t"]]:
    """A function: ids of CLIP's tokenizer → BERT's ids of the same words, padded and cut to 35 tokens.

    The words come back in lower case and without repeated blanks, as BERT reads them anyhow. CLIP's tokenizer takes
    digits one by one: neighbours are put together again, but what follows them stays apart (`1990 s`).

    Args:
        vocabulary: vocab.txt of bert-base-uncased.

    Raises:
        UserError: there is none.
    """
    if not vocabulary.is_file():
        raise UserError(f"{vocabulary}: no such file; ImageReward reads captions with that of bert-base-uncased")
    clip, bert = CLIPTokenizer.from_pretrained(CLIP_TOKENIZER), BertTokenizer.from_pretrained(vocabulary.parent)

    def read(prompts: TokenIds) -> Int[np.ndarray, "b t"]:
        rows, end = np.asarray(of_clip(jnp.asarray(prompts))).tolist(), clip.eos_token_id
        words = [re.sub(r"(?<=\d) (?=\d)", "", clip.decode(row[1 : [*row, end].index(end)])) for row in rows]
        found = bert(words, padding="max_length", truncation=True, max_length=_TOKENS, return_tensors="np")
        return found.input_ids.astype(np.int32)

    return read
