"""The preference estimator f(image, prompt): any CLIPModel trained as PickScore is (Kirstain et al. 2023)."""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from hgdpo_jax import runtime
from hgdpo_jax.models.clip import CLIPModel
from hgdpo_jax.models.convert import load_model

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


class Judgement(NamedTuple):
    """f(image, prompt), and the projected image embedding, not normalised."""

    score: Float[Array, "b"]
    embedding: Float[Array, "b p"]


def clip_pixels(images: Float[Array, "b H W 3"], size: int) -> Float[Array, "b size size 3"]:
    """CLIP's preprocessing of images in [-1, 1]: bicubic to the short side, centre cut, normalised."""
    b, height, width, _ = images.shape
    short = min(height, width)
    new = (int(height * size / short), int(width * size / short))  # cut off, as the image processor does
    if new != (height, width):
        images = jnp.clip(jax.image.resize(images, (b, *new, 3), "cubic"), -1.0, 1.0)
    top, left = (new[0] - size) // 2, (new[1] - size) // 2
    return clip_normalised(images[:, top : top + size, left : left + size])


def clip_normalised(images: Float[Array, "*b 3"]) -> Float[Array, "*b 3"]:
    """Images in [-1, 1] in the units that CLIP's vision towers were trained on."""
    return (0.5 * (images + 1.0) - jnp.asarray(_MEAN)) / jnp.asarray(_STD)


def judge(model: CLIPModel, images: Float[Array, "b H W 3"], input_ids: Int[Array, "b s"]) -> Judgement:
    """f = exp(logit_scale) · cos(image embedding, text embedding); images in [-1, 1]."""
    image = model.image_embeds(clip_pixels(images, model.config["vision_config"]["image_size"]))
    text = model.text_embeds(input_ids)
    cosine = jnp.sum(image * text, -1) / (jnp.linalg.norm(image, axis=-1) * jnp.linalg.norm(text, axis=-1))
    return Judgement(jnp.exp(model.logit_scale[...]) * cosine, image)


class Scorer:
    """A compiled preference estimator from a folder that transformers wrote.

    Token ids are those of the pipeline's tokenizer: every CLIP text tower shares its vocabulary, and what follows the
    first end-of-text token does not count.

    Raises:
        UserError: no such folder, or weights that do not fit its config.json.
    """

    def __init__(self, folder: str | Path, mesh: Mesh) -> None:
        graph, weights = nnx.split(load_model(CLIPModel, folder))
        self._weights = jax.device_put(weights, runtime.replicated(mesh))
        self._judge = jax.jit(lambda weights, images, ids: judge(nnx.merge(graph, weights), images, ids))

    def __call__(self, images: Float[Array, "b H W 3"], input_ids: Int[Array, "b s"]) -> Judgement:
        """Scores and embeddings of images in [-1, 1]."""
        return self._judge(self._weights, images, input_ids)
