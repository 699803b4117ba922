"""The preference estimator f(image, prompt): any CLIPModel trained as PickScore is (Kirstain et al. 2023).

CLIP score and HPS are functions of the same cosine.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hgdpo_jax.config import ASSETS
from hgdpo_jax.models.clip import CLIPModel
from hgdpo_jax.models.preprocessing import CLIP, Preprocessing, clip_pixels
from hgdpo_jax.models.text import of_clip

Images, TokenIds = Float[Array | np.ndarray, "b H W 3"], Int[Array | np.ndarray, "b s"]

CLIP_TOKENIZER = ASSETS / "portraits" / "base" / "tokenizer"  # the vocabulary that every CLIP text tower shares


class Judgement(NamedTuple):
    """f(image, prompt), and the projected image embedding, not normalised, of those that have one."""

    score: Float[Array | np.ndarray, "b"]
    embedding: Float[Array | np.ndarray, "b p"] | None = None


def cosine(
    model: CLIPModel, images: Float[Array, "b H W 3"], input_ids: Int[Array, "b s"], how: Preprocessing = CLIP
) -> Judgement:
    """cos(image embedding, text embedding); images in [-1, 1]."""
    image = model.image_embeds(clip_pixels(images, model.config["vision_config"]["image_size"], how))
    text = model.text_embeds(of_clip(input_ids))
    cosine = jnp.sum(image * text, -1) / (jnp.linalg.norm(image, axis=-1) * jnp.linalg.norm(text, axis=-1))
    return Judgement(cosine, image)


def judge(
    model: CLIPModel, images: Float[Array, "b H W 3"], input_ids: Int[Array, "b s"], how: Preprocessing = CLIP
) -> Judgement:
    """f = exp(logit_scale) · cos(image embedding, text embedding); images in [-1, 1]."""
    found = cosine(model, images, input_ids, how)
    return found._replace(score=jnp.exp(model.logit_scale[...]) * found.score)


def clip_score(
    model: CLIPModel, images: Float[Array, "b H W 3"], input_ids: Int[Array, "b s"], how: Preprocessing = CLIP
) -> Judgement:
    """100 · max(cos, 0): CLIPScore (Hessel et al. 2021) with 100 for its 2.5, as it is stated for drawings."""
    found = cosine(model, images, input_ids, how)
    return found._replace(score=100.0 * jnp.maximum(found.score, 0.0))
