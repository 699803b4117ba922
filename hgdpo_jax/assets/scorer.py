"""Trains the embedded preference scorers: CLIPModels for which photographs beat worse pictures and wrong captions.

python -m hgdpo_jax.assets.scorer PORTRAITS                  writes PORTRAITS/scorer, which chooses the winners
python -m hgdpo_jax.assets.scorer PORTRAITS --drawn DRAWN    writes PORTRAITS/judge, which chooses nothing

For the one that chooses, worse pictures are degraded copies. The judge is another network, which learnt from other
degradations and from the faces that the base learnt from, in the folder DRAWN. All pass through the VAE, or a scorer
would learn to recognise the VAE.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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


def _config(width: int, layers: int, patch: int) -> dict[str, Any]:
    """config.json of a CLIPModel with a vision tower of this size."""
    return {
        "architectures": ["CLIPModel"],
        "logit_scale_init_value": 2.6592,
        "model_type": "clip",
        "projection_dim": 32,
        "text_config": {
            **_TOWER,
            "bos_token_id": 49406,
            "eos_token_id": 49407,
            "hidden_size": 8,
            "intermediate_size": 32,
            "max_position_embeddings": 77,
            "model_type": "clip_text_model",
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "pad_token_id": 49407,
            "vocab_size": 49408,
        },
        "vision_config": {
            **_TOWER,
            "hidden_size": width,
            "image_size": SIZE,
            "intermediate_size": 3 * width,
            "model_type": "clip_vision_model",
            "num_attention_heads": 4,
            "num_channels": 3,
            "num_hidden_layers": layers,
            "patch_size": patch,
        },
    }


CONFIG = _config(64, 4, 8)
LEVELS, DRAWN = 5, 4000
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


def _coarse(image: Pixels, other: Pixels, level: float, rng: np.random.Generator) -> Pixels:
    """As from fewer pixels."""
    side = round(SIZE / (1.0 + 3.0 * level))
    picture = Image.fromarray(np.uint8((image + 1) * 127.5)).resize((side, side), Image.Resampling.BOX)
    return np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC), np.float32) / 127.5 - 1.0


def _cast(image: Pixels, other: Pixels, level: float, rng: np.random.Generator) -> Pixels:
    """A cast of some colour, and too much or too little contrast."""
    contrast = np.exp(level * rng.choice([-0.7, 0.7]))
    return (contrast * image + 0.4 * level * rng.standard_normal(3)).clip(-1, 1).astype(np.float32)


def _unlike_halves(image: Pixels, other: Pixels, level: float, rng: np.random.Generator) -> Pixels:
    """One half of the face higher and larger than the other."""
    half = np.roll(image, round(5.0 * level * rng.choice([-1, 1])), axis=0)
    wider = np.linspace(0, SIZE - 1, SIZE).round() + (np.arange(SIZE) - SIZE / 2) * -0.25 * level
    moved = half[:, wider.round().astype(int).clip(0, SIZE - 1)]
    share = np.clip((np.arange(SIZE) - SIZE / 2) / 6.0 + 0.5, 0, 1)[None, :, None]
    return ((1 - share) * image + share * moved).astype(np.float32)


def _wave(image: Pixels, other: Pixels, level: float, rng: np.random.Generator) -> Pixels:
    """Rows moved to and fro."""
    length, phase = rng.uniform(12, 30), rng.uniform(0, 2 * np.pi)
    x = np.arange(SIZE)[None] + (4.0 * level * np.sin(2 * np.pi * np.arange(SIZE) / length + phase))[:, None]
    return image[np.arange(SIZE)[:, None], x.round().astype(int).clip(0, SIZE - 1)]


Degradation = Callable[[Pixels, Pixels, float, np.random.Generator], Pixels]


class Kind(NamedTuple):
    """A scorer: its folder, network, degradations, and the seed of its weights and data."""

    name: str
    config: dict[str, Any]
    degradations: tuple[Degradation, ...]
    seed: int


CHOOSING = Kind("scorer", CONFIG, (_blur, _warp, _mix, _patch, _none), 0)
JUDGE = Kind("judge", _config(48, 5, 8), (_coarse, _cast, _unlike_halves, _wave), 1)


def ladders(
    through: Callable, shape: tuple[int, ...], kind: Kind, images: Float[np.ndarray, "n H W 3"], copies: int, seed: int
) -> tuple[Float[np.ndarray, "m levels H W 3"], np.ndarray]:
    """For each photograph and copy, one degradation at rising levels, the first none; and the photograph's number.

    Args:
        through: (images, noise of their latents) → images after the VAE.
        shape: of a latent.
    """
    rng = np.random.default_rng(seed)
    rows, numbers = [], []
    for _ in tqdm(range(copies), desc="degrade", unit="copy"):
        for i, image in enumerate(images):
            degrade = kind.degradations[rng.integers(len(kind.degradations))]
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("portraits", type=Path)
    parser.add_argument("--drawn", type=Path, help="folder of drawn faces: train the judge")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--copies", type=int, default=12)
    arguments = parser.parse_args()
    kind, base = JUDGE if arguments.drawn else CHOOSING, arguments.portraits / "base"
    vae = load_model(AutoencoderKL, base / "vae")
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
    through = jax.jit(lambda x, noise: vae.to_images(vae.to_latents(x) + noise))
    shape = jax.eval_shape(vae.to_latents, jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)).shape[1:]
    data, drawn = {}, {}
    for split, copies in (("train", arguments.copies), ("heldout", 4)):
        photographs, images = load_images(list_photographs(arguments.portraits, split), (SIZE, SIZE))
        ids = tokenize(tokenizer, [p.caption for p in photographs])
        data[split] = (*ladders(through, shape, kind, images, copies, seed=len(images) + kind.seed), ids)
        if arguments.drawn:
            listed = list_photographs(arguments.drawn, "base" if split == "train" else "heldout")[:DRAWN]
            made = load_images(listed, (SIZE, SIZE))[1]
            parts = np.split(made, range(LEVELS, len(made), LEVELS))
            decoded = [np.asarray(through(part, np.zeros((len(part), *shape), np.float32))) for part in parts]
            drawn[split] = np.concatenate(decoded).astype(np.float16)

    graph, weights = nnx.split(CLIPModel(kind.config, rngs=nnx.Rngs(kind.seed)))
    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 100, arguments.steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.1))

    def batch(split: str, size: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """Better image, worse image, their caption, another caption; the better one is untouched half of the time.

        For the judge half of the worse ones are drawn faces, where the better ones are untouched.
        """
        rows, numbers, ids = data[split]
        pick = rng.integers(len(rows), size=size)
        low = np.where(rng.random(size) < 0.5, 0, rng.integers(0, LEVELS - 1, size))
        high = rng.integers(low + 1, LEVELS)
        wrong = rng.integers(len(ids), size=size)
        better, worse = rows[pick, low], rows[pick, high]
        if drawn:
            half = size // 2
            better[:half], worse[:half] = rows[pick[:half], 0], drawn[split][rng.integers(len(drawn[split]), size=half)]
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

    optimizer, rng = tx.init(weights), np.random.default_rng(kind.seed)
    with tqdm(range(arguments.steps), desc=kind.name, unit="step") as bar:
        for i in bar:
            weights, optimizer, right = step(weights, optimizer, batch("train", arguments.batch, rng))
            if i % 100 == 0:
                found, held = np.asarray(right), heldout(weights)
                bar.set_postfix(image=f"{found[0]:.2f}/{held[0]:.2f}", caption=f"{found[1]:.2f}/{held[1]:.2f}")
    image, caption = heldout(weights)
    print(f"{kind.name}, held-out: prefers the better image {image:.3f}, the right caption {caption:.3f}")
    save_model(nnx.merge(graph, weights), arguments.portraits / kind.name, dtype=np.float16)


if __name__ == "__main__":
    command.run(main)
