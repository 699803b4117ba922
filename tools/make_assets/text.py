"""Trains the embedded text encoder as CLIP's was: to tell which caption belongs to which picture.

python -m tools.make_assets.text PORTRAITS PEOPLE      writes PORTRAITS/base/text_encoder

So its hidden states say what a caption means, and the base learns to follow it sooner than with random ones. The image
tower beside it is not kept.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from transformers import CLIPTokenizer

from hgdpo_jax.data.photographs import Photograph, list_photographs
from hgdpo_jax.data.pixels import load_images
from hgdpo_jax.devices.start import start
from hgdpo_jax.diffusion.stable_diffusion import tokenize
from hgdpo_jax.models.clip import CLIPModel
from hgdpo_jax.models.convert import save_model
from hgdpo_jax.models.preprocessing import clip_pixels
from hgdpo_jax.run import command
from tools.make_assets.base import TEXT_ENCODER
from tools.make_assets.clip import Task, config, fit
from tools.make_assets.photographs import SIZE

SHOWN = 8000  # pictures that it learns from


def loss(model: CLIPModel, images: Array, ids: Array) -> tuple[Array, Array]:
    """CLIP's cross-entropy over a batch, both ways (Radford et al. 2021); equal captions share what is right. And how
    often a picture's own caption, or an equal one, is the nearest."""
    picture, text = model.image_embeds(clip_pixels(images, SIZE)), model.text_embeds(ids)
    picture, text = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (picture, text))
    logits = jnp.exp(model.logit_scale[...]) * picture @ text.T
    equal = (ids[:, None] == ids).all(-1)
    wanted = equal / equal.sum(1, keepdims=True)
    both = [-(wanted * jax.nn.log_softmax(x)).sum(1).mean() for x in (logits, logits.T)]
    nearest = jnp.take_along_axis(equal, logits.argmax(1)[:, None], 1).mean()
    return 0.5 * (both[0] + both[1]), jnp.array([nearest])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("portraits", type=Path)
    parser.add_argument("people", type=Path, help="the folder of made people")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=64)
    arguments = parser.parse_args()
    start()
    folder = arguments.portraits / "base"
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")

    def arrays(photographs: list[Photograph]) -> tuple[np.ndarray, np.ndarray]:
        photographs, images = load_images(photographs, (SIZE, SIZE))
        return images, tokenize(tokenizer, [p.caption for p in photographs])

    listed = list_photographs(arguments.people, "base")
    images, ids = arrays(listed[:: -(-len(listed) // SHOWN)])
    held = arrays(list_photographs(arguments.people, "heldout")[:256])

    def batch(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        pick = rng.integers(len(images), size=arguments.batch)
        return images[pick][:, :, :: rng.choice([-1, 1])], ids[pick]

    towers = {**config(48, 4, 16), "text_config": {**TEXT_ENCODER, "bos_token_id": 49406, "eos_token_id": 49407}}
    model, (nearest,) = fit(Task("text", towers, loss, batch, held), arguments.steps, seed=4)
    print(f"held-out: of {len(held[1])} captions that of a made person is the nearest to the picture in {nearest:.1%}")
    text = model.text_model
    text.config = type(text.config)(TEXT_ENCODER)
    save_model(text, folder / "text_encoder", dtype=np.float16)


if __name__ == "__main__":
    command.run(main)
