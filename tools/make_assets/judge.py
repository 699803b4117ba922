"""Trains the embedded judges: two CLIPModels that prefer photographs, and choose nothing.

python -m tools.make_assets.judge PORTRAITS PEOPLE      writes PORTRAITS/judge and PORTRAITS/second_judge

Both learn that a photograph is better than a made person, from which the base learnt, and better than degraded copies
of itself; the first also that its caption is better than another. They differ in their vision towers, in how the copies
are degraded, and in the people they see, so that what both say is more than one network's taste. All pictures pass
through the VAE, or they would learn to recognise the VAE.
"""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from PIL import Image, ImageFilter
from tqdm import tqdm
from transformers import CLIPTokenizer

from hgdpo_jax.data.photographs import list_photographs
from hgdpo_jax.data.pixels import load_images
from hgdpo_jax.devices.start import start
from hgdpo_jax.diffusion.stable_diffusion import tokenize
from hgdpo_jax.models.clip import CLIPModel
from hgdpo_jax.models.convert import load_model, save_model
from hgdpo_jax.models.vae import AutoencoderKL
from hgdpo_jax.run import command
from hgdpo_jax.scoring.preference import judge
from tools.make_assets.clip import Task, config, fit
from tools.make_assets.photographs import SIZE

LEVELS, PEOPLE = 5, 2000
Pixels = Float[np.ndarray, "H W 3"]


def _framed(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Another framing of a photograph: a little nearer, turned and shifted, mirrored by chance."""
    side = SIZE * rng.uniform(0.8, 1.0)
    left, top = rng.uniform(0, SIZE - side, size=2)
    picture = Image.fromarray(np.uint8((image + 1) * 127.5)).rotate(
        rng.uniform(-8, 8), Image.Resampling.BICUBIC, fillcolor=tuple(map(int, (image[:8].mean((0, 1)) + 1) * 127.5))
    )
    picture = picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return (np.asarray(picture, np.float32) / 127.5 - 1.0)[:, :: rng.choice([-1, 1])]


def _blur(image: Pixels, other: Pixels, level: float, rng: np.random.Generator) -> Pixels:
    picture = Image.fromarray(np.uint8((image + 1) * 127.5)).filter(ImageFilter.GaussianBlur(float(3.0 * level)))
    return np.asarray(picture, np.float32) / 127.5 - 1.0


def _warp(image: Pixels, other: Pixels, level: float, rng: np.random.Generator) -> Pixels:
    """Moves pixels by a smooth random field of up to some fifteen pixels."""
    size = image.shape[0]
    field = rng.standard_normal((2, 4, 4))
    shift = np.stack([np.asarray(Image.fromarray(f.astype(np.float32)).resize((size, size), 3)) for f in field])
    y, x = np.mgrid[:size, :size] + 7.5 * level * shift
    return image[y.round().astype(int).clip(0, size - 1), x.round().astype(int).clip(0, size - 1)]


def _mix(image: Pixels, other: Pixels, level: float, rng: np.random.Generator) -> Pixels:
    """Two people in one: a double exposure."""
    return (1 - 0.5 * level) * image + 0.5 * level * other


def _patch(image: Pixels, other: Pixels, level: float, rng: np.random.Generator) -> Pixels:
    """Some squares of another photograph."""
    mask = rng.random((8, 8, 1)) < 0.5 * level
    return np.where(np.kron(mask, np.ones((SIZE // 8, SIZE // 8, 1))), other, image).astype(np.float32)


def _none(image: Pixels, other: Pixels, level: float, rng: np.random.Generator) -> Pixels:
    """Degraded in latent space instead."""
    return image


def _flat(image: Pixels, other: Pixels, level: float, rng: np.random.Generator) -> Pixels:
    """Fewer tones, as a drawing has them."""
    tones = 24 - 20 * level
    return (np.round(image * tones) / tones * (1 - 0.4 * level)).astype(np.float32)


def _pixels(image: Pixels, other: Pixels, level: float, rng: np.random.Generator) -> Pixels:
    """Coarser pixels."""
    picture, side = Image.fromarray(np.uint8((image + 1) * 127.5)), round(SIZE * (1 - 0.7 * level))
    coarse = picture.resize((side, side), Image.Resampling.BOX).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return np.asarray(coarse, np.float32) / 127.5 - 1.0


class Kind(NamedTuple):
    """What makes one judge another than the other.

    Attributes:
        name: of its folder.
        tower: width, layers and patch of its vision tower.
        degradations: of photographs.
        people: which of the made people it sees.
        captions: weight of the loss that tells captions apart.
    """

    name: str
    tower: tuple[int, int, int]
    degradations: tuple[Callable[..., Pixels], ...]
    people: slice
    captions: float
    seed: int


KINDS = (
    Kind("judge", (48, 5, 8), (_blur, _warp, _mix, _patch, _none), slice(0, PEOPLE), 0.5, 1),
    Kind("second_judge", (64, 3, 16), (_flat, _pixels, _warp, _none), slice(PEOPLE, 2 * PEOPLE), 0.0, 2),
)
Through = Callable[[np.ndarray, np.ndarray], Array]  # images, noise of their latents → images after the VAE


def ladders(
    through: Through, shape: tuple[int, ...], images: Float[np.ndarray, "n H W 3"], kind: Kind, copies: int
) -> tuple[Float[np.ndarray, "m levels H W 3"], np.ndarray]:
    """For each photograph and copy, one degradation at rising levels, the first none; and the photograph's number.

    `shape` is that of a latent.
    """
    rng = np.random.default_rng([kind.seed, len(images)])
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


def loss(captions: float, model: CLIPModel, better: Array, worse: Array, ids: Array, wrong: Array) -> tuple:
    """−log σ of the score differences, as PickScore's softmax over two, and `captions` times that of captions; equal
    captions are left out. And how often the better picture and the right caption are preferred."""
    score = judge(model, better, ids).score
    image = score - judge(model, worse, ids).score
    text = score - judge(model, better, wrong).score
    other = (ids != wrong).any(-1)
    right = jnp.array([(image > 0).mean(), ((text > 0) * other).sum() / jnp.maximum(other.sum(), 1)])
    return -(jax.nn.log_sigmoid(image) + captions * other * jax.nn.log_sigmoid(text)).mean(), right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("portraits", type=Path)
    parser.add_argument("people", type=Path, help="the folder of made people")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--copies", type=int, default=8)
    arguments = parser.parse_args()
    start()
    base = arguments.portraits / "base"
    vae = load_model(AutoencoderKL, base / "vae")
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
    through = jax.jit(lambda x, noise: vae.to_images(vae.to_latents(x) + noise))
    shape = jax.eval_shape(vae.to_latents, jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)).shape[1:]
    for kind in KINDS:
        data, made = {}, {}
        for split, of_people, copies in (("train", "base", arguments.copies), ("heldout", "heldout", 4)):
            photographs, images = load_images(list_photographs(arguments.portraits, split), (SIZE, SIZE))
            ids = tokenize(tokenizer, [p.caption for p in photographs])
            data[split] = (*ladders(through, shape, images, kind, copies), ids)
            listed = list_photographs(arguments.people, of_people)
            people = load_images(listed[kind.people] or listed[:PEOPLE], (SIZE, SIZE))[1]
            parts = np.split(people, range(LEVELS, len(people), LEVELS))
            decoded = [np.asarray(through(part, np.zeros((len(part), *shape), np.float32))) for part in parts]
            made[split] = np.concatenate(decoded).astype(np.float16)

        def batch(
            rng: np.random.Generator,
            split: str = "train",
            size: int = arguments.batch,
            data: dict = data,
            made: dict = made,
        ) -> tuple[np.ndarray, ...]:
            """Better picture, worse picture, their caption, another caption. Half of the worse ones are made people,
            where the better ones are untouched."""
            rows, numbers, ids = data[split]
            pick = rng.integers(len(rows), size=size)
            low = np.where(rng.random(size) < 0.5, 0, rng.integers(0, LEVELS - 1, size))
            high, wrong, half = rng.integers(low + 1, LEVELS), rng.integers(len(ids), size=size), size // 2
            better, worse = rows[pick, low], rows[pick, high]
            better[:half], worse[:half] = rows[pick[:half], 0], made[split][rng.integers(len(made[split]), size=half)]
            return better.astype(np.float32), worse.astype(np.float32), ids[numbers[pick]], ids[wrong]

        held = batch(np.random.default_rng(1), "heldout", 512)
        task = Task(kind.name, config(*kind.tower), functools.partial(loss, kind.captions), batch, held)
        model, (image, caption) = fit(task, arguments.steps, seed=kind.seed)
        print(f"{kind.name}, held-out: prefers the better picture {image:.3f}, the right caption {caption:.3f}")
        save_model(model, arguments.portraits / kind.name, dtype=np.float16)


if __name__ == "__main__":
    command.run(main)
