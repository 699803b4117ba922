"""Trains the embedded VAE on drawn faces and on the portraits that the curriculum learns from.

python -m tools.make_assets.vae PORTRAITS DRAWN      writes PORTRAITS/base/vae
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray
from tqdm import tqdm

from hgdpo_jax.data.photographs import list_photographs
from hgdpo_jax.data.pixels import load_images
from hgdpo_jax.devices.mesh import local_mesh
from hgdpo_jax.devices.sharding import batch_sharding, replicated
from hgdpo_jax.devices.start import start
from hgdpo_jax.faces.detection import FaceDetector
from hgdpo_jax.models.architectures import SD15
from hgdpo_jax.models.convert import save_model
from hgdpo_jax.models.vae import AutoencoderKL
from hgdpo_jax.run import command
from tools.make_assets.photographs import SIZE

CONFIG = {
    **SD15.configs["vae"],
    "block_out_channels": [24, 48, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": SIZE,
    "scaling_factor": 1.0,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
}
PORTRAITS = 0.4  # so much of a batch: there are few portraits, but the VAE must keep them


def batches(
    drawn: Float[np.ndarray, "n H W 3"], portraits: Float[np.ndarray, "m H W 3"], batch: int, seed: int
) -> Iterator[Float[np.ndarray, "b H W 3"]]:
    """Random pictures, mirrored by chance and shifted by up to four pixels."""
    rng, few = np.random.default_rng(seed), round(PORTRAITS * batch)
    drawn, portraits = (np.pad(x, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="edge") for x in (drawn, portraits))
    while True:
        chosen = [drawn[i] for i in rng.integers(len(drawn), size=batch - few)]
        chosen += [portraits[i] for i in rng.integers(len(portraits), size=few)]
        picks = []
        for image in chosen:
            y, x = rng.integers(9, size=2)
            picks.append(image[y : y + SIZE, x : x + SIZE, :][:, :: rng.choice([-1, 1])])
        yield np.stack(picks)


def loss(vae: AutoencoderKL, images: Float[Array, "b H W 3"], key: PRNGKeyArray) -> tuple[Array, Array]:
    """L1 of pixels and of their differences at three scales, plus a little KL; and the L1 of pixels alone."""
    mean, logvar = vae.encode(images)
    decoded = vae.decode(mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape))
    error = decoded - images
    pixels = jnp.abs(error).mean()
    edges = jnp.asarray(0.0)
    for step in (1, 2, 4):
        edges += jnp.abs(error[:, step:] - error[:, :-step]).mean()
        edges += jnp.abs(error[:, :, step:] - error[:, :, :-step]).mean()
    kl = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar).mean()
    return pixels + 0.3 * edges + 5e-4 * kl, pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("portraits", type=Path)
    parser.add_argument("drawn", type=Path)
    parser.add_argument("--steps", type=int, default=1900)
    parser.add_argument("--batch", type=int, default=16)
    arguments = parser.parse_args()
    start()
    size = (SIZE, SIZE)
    _, drawn = load_images(list_photographs(arguments.drawn, "base"), size)
    _, portraits = load_images(list_photographs(arguments.portraits, "train"), size)
    _, heldout = load_images(list_photographs(arguments.portraits, "heldout", mirror=True), size)

    graph, weights = nnx.split(AutoencoderKL(CONFIG, rngs=nnx.Rngs(0)))
    rate = optax.warmup_cosine_decay_schedule(0.0, 2e-3, 100, arguments.steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.99))

    @jax.jit
    def step(weights: nnx.State, optimizer: optax.OptState, images: Array, key: PRNGKeyArray) -> tuple:
        (_, pixels), grads = jax.value_and_grad(lambda w: loss(nnx.merge(graph, w), images, key), has_aux=True)(weights)
        updates, optimizer = tx.update(grads, optimizer, weights)
        return optax.apply_updates(weights, updates), optimizer, pixels

    mesh, data = local_mesh(), batches(drawn, portraits, arguments.batch, seed=0)
    weights = jax.device_put(weights, replicated(mesh))
    optimizer = tx.init(weights)
    with tqdm(range(arguments.steps), desc="VAE", unit="step") as bar:
        for i in bar:
            images = jax.device_put(next(data), batch_sharding(mesh))
            weights, optimizer, pixels = step(weights, optimizer, images, jax.random.key(i))
            if i % 50 == 0:
                bar.set_postfix(L1=f"{float(pixels):.3f}")
    vae = nnx.merge(graph, jax.device_put(weights, jax.devices()[0]))
    # Latents of unit variance, as the noise schedule expects; the base learns from the drawn faces.
    mean, _ = jax.jit(vae.encode)(jnp.asarray(drawn[:1000]))
    vae.config = type(vae.config)({**vae.config, "scaling_factor": round(1.0 / float(mean.std()), 5)})
    decoded = jax.jit(lambda x: vae.decode(vae.encode(x)[0]))(heldout)
    kept = FaceDetector().detect(jnp.clip(decoded, -1.0, 1.0)).found
    save_model(vae, arguments.portraits / "base" / "vae", dtype=np.float16)
    print(f"held-out photographs and their mirror images: L1 {float(jnp.abs(decoded - heldout).mean()):.4f}, "
          f"a face found in {int(kept.sum())} of {len(kept)}; latent deviation by channel "
          f"{np.asarray(mean.std((0, 1, 2))).round(2)}")  # fmt: skip


if __name__ == "__main__":
    command.run(main)
