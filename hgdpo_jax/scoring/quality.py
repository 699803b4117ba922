"""Scorers that look at the picture alone: LAION's aesthetics, and CLIP-IQA (Wang et al. 2023)."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from transformers import CLIPTokenizer

from hgdpo_jax.diffusion.stable_diffusion import tokenize
from hgdpo_jax.models.clip import CLIPTextModelWithProjection, CLIPVisionModelWithProjection
from hgdpo_jax.models.clip_resnet import CLIPResNet
from hgdpo_jax.models.preprocessing import Preprocessing, clip_normalised, clip_pixels
from hgdpo_jax.models.rating import Rating
from hgdpo_jax.scoring.preference import CLIP_TOKENIZER, Images, Judgement

# Better and worse, as torchmetrics and piq have them.
ANTONYMS = {
    "quality": ("Good photo.", "Bad photo."),
    "sharpness": ("Sharp photo.", "Blurry photo."),
    "natural": ("Natural photo.", "Synthetic photo."),
}
_SCALE = 100.0  # of the cosines: exp(logit_scale) of OpenAI's networks


def aesthetics(
    tower: CLIPVisionModelWithProjection, predictor: Rating, images: Images, how: Preprocessing
) -> Judgement:
    """LAION's rating, about 1 to 10, of images in [-1, 1]."""
    embedding = tower(clip_pixels(images, tower.config["image_size"], how)).pooled.astype(jnp.float32)
    return Judgement(predictor(_unit(embedding)), embedding)


def antonym_ids(kind: str) -> Int[np.ndarray, "2 s"]:
    """Token ids of two of :data:`ANTONYMS`, by CLIP's vocabulary."""
    tokenizer = CLIPTokenizer.from_pretrained(CLIP_TOKENIZER)
    return tokenize(tokenizer, ANTONYMS[kind])


def clip_iqa(
    tower: CLIPResNet, text: CLIPTextModelWithProjection, images: Images, antonyms: Int[np.ndarray, "2 s"]
) -> Judgement:
    """How much nearer images in [-1, 1], at the size that they have, are to the first of two captions: 0 to 1."""
    embedding = tower(clip_normalised(jnp.asarray(images)))
    logits = _SCALE * _unit(embedding) @ _unit(text(jnp.asarray(antonyms)).pooled.astype(jnp.float32)).T
    return Judgement(jax.nn.softmax(logits, axis=-1)[:, 0], embedding)


def _unit(x: Float[Array, "n p"]) -> Float[Array, "n p"]:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
