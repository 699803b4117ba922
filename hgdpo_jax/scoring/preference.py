"""The preference estimator f(image, prompt): any CLIPModel trained as PickScore is (Kirstain et al. 2023)."""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from hgdpo_jax.devices.sharding import replicated
from hgdpo_jax.models.clip import CLIPModel
from hgdpo_jax.models.convert import load_model
from hgdpo_jax.models.preprocessing import CLIP, Preprocessing, clip_pixels, read_preprocessing
from hgdpo_jax.models.text import of_first

Images, TokenIds = Float[Array | np.ndarray, "b H W 3"], Int[Array | np.ndarray, "b s"]


class Judgement(NamedTuple):
    """f(image, prompt), and the projected image embedding, not normalised."""

    score: Float[Array, "b"]
    embedding: Float[Array, "b p"]


def judge(
    model: CLIPModel, images: Float[Array, "b H W 3"], input_ids: Int[Array, "b s"], how: Preprocessing = CLIP
) -> Judgement:
    """f = exp(logit_scale) · cos(image embedding, text embedding); images in [-1, 1]."""
    image = model.image_embeds(clip_pixels(images, model.config["vision_config"]["image_size"], how))
    text = model.text_embeds(of_first(input_ids))
    cosine = jnp.sum(image * text, -1) / (jnp.linalg.norm(image, axis=-1) * jnp.linalg.norm(text, axis=-1))
    return Judgement(jnp.exp(model.logit_scale[...]) * cosine, image)


class Scorer:
    """A compiled preference estimator from a folder that transformers wrote.

    Images are cut and normalised as its preprocessor_config.json says. Token ids are those of the pipeline's (first)
    tokenizer: every CLIP text tower shares its vocabulary, and tokens after the first end of text do not count.

    Raises:
        UserError: no such folder, weights that do not fit its config.json, or a preprocessing that is not computed.
    """

    def __init__(self, folder: str | Path, mesh: Mesh) -> None:
        model = load_model(CLIPModel, folder)
        how = read_preprocessing(Path(folder), model.config["vision_config"]["image_size"])
        graph, weights = nnx.split(model)
        self._weights = jax.device_put(weights, replicated(mesh))
        self._judge = jax.jit(lambda weights, images, ids: judge(nnx.merge(graph, weights), images, ids, how))

    def __call__(self, images: Images, input_ids: TokenIds) -> Judgement:
        """Scores and embeddings of images in [-1, 1]."""
        return self._judge(self._weights, images, input_ids)
