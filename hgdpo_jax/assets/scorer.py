"""Trains the embedded preference scorer: a CLIPModel for which photographs beat degraded copies and wrong captions.

python -m hgdpo_jax.assets.scorer PORTRAITS      writes PORTRAITS/scorer

Photographs and degraded copies alike pass through the VAE, or the scorer would learn to recognise the VAE.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float
from PIL import Image, ImageFilter
from tqdm import tqdm
from transformers import CLIPTokenizer

from hgdpo_jax import command
from hgdpo_jax.assets.photographs import SIZE
from hgdpo_jax.data.photographs import list_photographs, load_images
from hgdpo_jax.diffusion.pipeline import tokenize
from hgdpo_jax.models.clip import CLIPModel
from hgdpo_jax.models.convert import load_model, save_model
from hgdpo_jax.models.vae import AutoencoderKL
from hgdpo_jax.scoring.preference import judge

_TOWER = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
CONFIG = {
    "architectures": ["CLIPModel"],
    "logit_scale_init_value": 2.6592,
    "model_type": "clip",
    "projection_dim": 32,
    "text_config": {
        **_TOWER,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "hidden_size": 16,
        "intermediate_size": 64,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "pad_token_id": 49407,
        "vocab_size": 49408,
    },
    "vision_config": {
        **_TOWER,
        "hidden_size": 64,
        "image_size": SIZE,
        "intermediate_size": 192,
        "model_type": "clip_vision_model",
        "num_attention_heads": 4,
        "num_channels": 3,
        "num_hidden_layers": 4,
        "patch_size": 8,
    },
}
LEVELS = 5
Pixels = Float[np.ndarray, "H W 3"]


def _framed(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Another framing of a photograph: a little nearer, turned and shifted, mirrored by chance."""
    side = SIZE * rng.uniform(0.8, 1.0)
    left, top = rng.uniform(0, SIZE - side, size=2)
    picture = Image.fromarray(np.uint8((image + 1) * 127.5)).rotate(
        rng.uniform(-8, 8), Image.Resampling.BICUBIC, fillcolor=tuple(np.uint8((image[:8].mean((0, 1)) + 1) * 127.5))
    )
    picture = picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return (np.asarray(picture, np.float32) / 127.5 - 1.0)[:, :: rng.choice([-1, 1])]


def _blur(image: Pixels, other: Pixels, level: float, rng: np.random.Generator) -> Pixels:
    picture = Image.fromarray(np.uint8((image + 1) * 127.5)).filter(ImageFilter.GaussianBlur(float(2.0 * level)))
    return np.asarray(picture, np.float32) / 127.5 - 1.0


def _warp(image: Pixels, other: Pixels, level: float, rng: np.random.Generator) -> Pixels:
    """Moves pixels by a smooth random field of up to some ten pixels."""
    size = image.shape[0]
    field = rng.standard_normal((2, 4, 4))
    shift = np.stack([np.asarray(Image.fromarray(f.astype(np.float32)).resize((size, size), 3)) for f in field])
    y, x = np.mgrid[:size, :size] + 5.0 * level * shift
    return image[y.round().astype(int).clip(0, size - 1), x.round().astype(int).clip(0, size - 1)]


def _mix(image: Pixels, other: Pixels, level: float, rng: np.random.Generator) -> Pixels:
    """Two people in one: a double exposure."""
    return (1 - 0.5 * level) * image + 0.5 * level * other


def _patch(image: Pixels, other: Pixels, level: float, rng: np.random.Generator) -> Pixels:
    """Some 8x8 patches of another photograph."""
    mask = rng.random((SIZE // 8, SIZE // 8, 1)) < 0.5 * level
    return np.where(np.kron(mask, np.ones((8, 8, 1))), other, image).astype(np.float32)


def _none(image: Pixels, other: Pixels, level: float, rng: np.random.Generator) -> Pixels:
    """Degraded in latent space instead."""
    return image


DEGRADATIONS: tuple[Callable[..., Pixels], ...] = (_blur, _warp, _mix, _patch, _none)


def ladders(
    vae: AutoencoderKL, images: Float[np.ndarray, "n H W 3"], copies: int, seed: int
) -> tuple[Float[np.ndarray, "m levels H W 3"], np.ndarray]:
    """For each photograph and copy, one degradation at rising levels, the first none; and the photograph's number."""
    rng = np.random.default_rng(seed)
    through = jax.jit(lambda x, noise: vae.to_images(vae.to_latents(x) + noise))
    shape = jax.eval_shape(vae.to_latents, jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)).shape[1:]
    rows, numbers = [], []
    for _ in tqdm(range(copies), desc="degrade", unit="copy"):
        for i, image in enumerate(images):
            degrade = DEGRADATIONS[rng.integers(len(DEGRADATIONS))]
            state, other = int(rng.integers(2**31)), images[rng.integers(len(images))]
            image = _framed(image, rng)
            levels = np.linspace(0, 1, LEVELS)
            pictures = np.stack([degrade(image, other, level, np.random.default_rng(state)) for level in levels])
            # The generator's own faults live in the latents; every copy gets a little of them.
            strength = (1.2 if degrade is _none else 0.2) * levels
            noise = strength[:, None, None, None] * rng.standard_normal(shape)
            rows.append(np.asarray(through(pictures.astype(np.float32), noise.astype(np.float32)), np.float16))
            numbers.append(i)
    return np.stack(rows), np.array(numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("portraits", type=Path)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--copies", type=int, default=12)
    arguments = parser.parse_args()
    base = arguments.portraits / "base"
    vae = load_model(AutoencoderKL, base / "vae")
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
    data = {}
    for split, parts, copies in (("train", ("base", "train"), arguments.copies), ("heldout", ("heldout",), 4)):
        photographs, images = load_images(list_photographs(arguments.portraits, *parts), (SIZE, SIZE))
        ids = tokenize(tokenizer, [p.caption for p in photographs])
        data[split] = (*ladders(vae, images, copies, seed=len(images)), ids)

    graph, weights = nnx.split(CLIPModel(CONFIG, rngs=nnx.Rngs(0)))
    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 100, arguments.steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.1))

    def batch(split: str, size: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """Better image, worse image, their caption, another caption; the better one is untouched half of the time."""
        rows, numbers, ids = data[split]
        pick = rng.integers(len(rows), size=size)
        low = np.where(rng.random(size) < 0.5, 0, rng.integers(0, LEVELS - 1, size))
        high = rng.integers(low + 1, LEVELS)
        wrong = rng.integers(len(ids), size=size)
        better, worse = rows[pick, low], rows[pick, high]
        return better.astype(np.float32), worse.astype(np.float32), ids[numbers[pick]], ids[wrong]

    def loss(weights, better, worse, ids, wrong):  # noqa: ANN001, ANN202
        """−log σ of the score differences, as PickScore's softmax over two; equal captions are left out."""
        model = nnx.merge(graph, weights)
        score = judge(model, better, ids).score
        image = score - judge(model, worse, ids).score
        text = score - judge(model, better, wrong).score
        other = (ids != wrong).any(-1)
        right = jnp.array([(image > 0).mean(), ((text > 0) * other).sum() / jnp.maximum(other.sum(), 1)])
        return -(jax.nn.log_sigmoid(image) + 0.5 * other * jax.nn.log_sigmoid(text)).mean(), right

    @jax.jit
    def step(weights, optimizer, arrays):  # noqa: ANN001, ANN202
        (_, right), grads = jax.value_and_grad(loss, has_aux=True)(weights, *arrays)
        updates, optimizer = tx.update(grads, optimizer, weights)
        return optax.apply_updates(weights, updates), optimizer, right

    def heldout(weights: Array) -> np.ndarray:
        return np.asarray(jax.jit(loss)(weights, *batch("heldout", 512, np.random.default_rng(1)))[1])

    optimizer, rng = tx.init(weights), np.random.default_rng(0)
    with tqdm(range(arguments.steps), desc="scorer", unit="step") as bar:
        for i in bar:
            weights, optimizer, right = step(weights, optimizer, batch("train", arguments.batch, rng))
            if i % 100 == 0:
                found, held = np.asarray(right), heldout(weights)
                bar.set_postfix(image=f"{found[0]:.2f}/{held[0]:.2f}", caption=f"{found[1]:.2f}/{held[1]:.2f}")
    image, caption = heldout(weights)
    print(f"held-out: prefers the better image {image:.3f}, the right caption {caption:.3f}")
    save_model(nnx.merge(graph, weights), arguments.portraits / "scorer", dtype=np.float16)


if __name__ == "__main__":
    command.run(main)
