"""Trains the embedded VAE on the portraits.

python -m hgdpo_jax.assets.vae PORTRAITS      writes PORTRAITS/base/vae
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float
from tqdm import tqdm

from hgdpo_jax import command
from hgdpo_jax.assets.photographs import SIZE
from hgdpo_jax.data.photographs import list_photographs, load_images
from hgdpo_jax.models.convert import save_model
from hgdpo_jax.models.vae import AutoencoderKL

CONFIG = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.42.1",
    "act_fn": "silu",
    "block_out_channels": [16, 32, 64, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 8,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "out_channels": 3,
    "sample_size": SIZE,
    "scaling_factor": 1.0,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}


def batches(images: Float[np.ndarray, "n H W 3"], batch: int, seed: int) -> Iterator[Float[np.ndarray, "b H W 3"]]:
    """Random photographs, mirrored by chance and shifted by up to four pixels."""
    rng = np.random.default_rng(seed)
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="reflect")
    while True:
        picks = []
        for i in rng.integers(len(images), size=batch):
            y, x = rng.integers(9, size=2)
            picks.append(padded[i, y : y + SIZE, x : x + SIZE, :][:, :: rng.choice([-1, 1])])
        yield np.stack(picks)


def loss(vae: AutoencoderKL, images: Float[Array, "b H W 3"], key: Array) -> tuple[Array, Array]:
    """L1 of pixels and of their differences at three scales, plus a little KL; and the first alone."""
    mean, logvar = vae.encode(images)
    decoded = vae.decode(mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape))
    error = decoded - images
    pixels = jnp.abs(error).mean()
    edges = jnp.asarray(0.0)
    for step in (1, 2, 4):
        edges += jnp.abs(error[:, step:] - error[:, :-step]).mean()
        edges += jnp.abs(error[:, :, step:] - error[:, :, :-step]).mean()
    kl = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar).mean()
    return pixels + 0.3 * edges + 1e-3 * kl, pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("portraits", type=Path)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=8)
    arguments = parser.parse_args()
    _, train = load_images(list_photographs(arguments.portraits, "base", "train"), (SIZE, SIZE))
    _, heldout = load_images(list_photographs(arguments.portraits, "heldout"), (SIZE, SIZE))

    vae = AutoencoderKL(CONFIG, rngs=nnx.Rngs(0))
    graph, weights = nnx.split(vae)
    rate = optax.warmup_cosine_decay_schedule(0.0, 1.5e-3, 100, arguments.steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.99))

    @jax.jit
    def step(weights, optimizer, images, key):  # noqa: ANN001, ANN202
        (_, pixels), grads = jax.value_and_grad(lambda w: loss(nnx.merge(graph, w), images, key), has_aux=True)(weights)
        updates, optimizer = tx.update(grads, optimizer, weights)
        return optax.apply_updates(weights, updates), optimizer, pixels

    optimizer, data = tx.init(weights), batches(train, arguments.batch, seed=0)
    with tqdm(range(arguments.steps), desc="VAE", unit="step") as bar:
        for i in bar:
            weights, optimizer, pixels = step(weights, optimizer, next(data), jax.random.key(i))
            if i % 50 == 0:
                bar.set_postfix(L1=f"{float(pixels):.3f}")
    vae = nnx.merge(graph, weights)
    # Latents of unit variance, as the noise schedule expects.
    mean, _ = jax.jit(vae.encode)(jnp.asarray(train))
    vae.config = type(vae.config)({**vae.config, "scaling_factor": round(1.0 / float(mean.std()), 5)})
    held = jnp.abs(jax.jit(lambda x: vae.decode(vae.encode(x)[0]))(heldout) - heldout).mean()
    save_model(vae, arguments.portraits / "base" / "vae", dtype=np.float16)
    print(f"held-out L1 {float(held):.4f}, latent deviation by channel {np.asarray(mean.std((0, 1, 2))).round(2)}")


if __name__ == "__main__":
    command.run(main)
