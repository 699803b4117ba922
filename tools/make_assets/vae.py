"""Trains the embedded VAE on what the base learns from and on the portraits that the curriculum learns from.

python -m tools.make_assets.vae PORTRAITS PEOPLE      writes PORTRAITS/base/vae

As in latent diffusion (Rombach et al. 2022): a reconstruction loss, a little KL, and a discriminator of patches,
without which skin and hair are smooth.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray
from tqdm import tqdm

from hgdpo_jax.data.photographs import list_photographs
from hgdpo_jax.data.pixels import load_images
from hgdpo_jax.devices.start import start
from hgdpo_jax.faces.detection import FaceDetector
from hgdpo_jax.models.architectures import SD15
from hgdpo_jax.models.convert import save_model
from hgdpo_jax.models.vae import AutoencoderKL
from hgdpo_jax.run import command
from tools.make_assets import mixture
from tools.make_assets.photographs import SIZE

CHANNELS, FACTOR = 8, 8  # of a latent, and pixels a side of each of its positions
CONFIG = {
    **SD15.configs["vae"],
    "block_out_channels": [16, 32, 64, 64],
    "latent_channels": CHANNELS,
    "layers_per_block": 1,
    "norm_num_groups": 2,  # smaller groups forget the colour of the whole
    "sample_size": SIZE,
    "scaling_factor": 1.0,
}
PHOTOGRAPHS = 0.35  # so much of a batch: there are few, but the VAE must keep them
_RATE, _KL, _AVERAGE = 2e-3, 5e-4, 0.995
_CUT = 0.8  # of the steps learn from pieces of half the side, of which many more fit into an hour
_ADVERSARY = 0.15  # the gradient of the discriminator, in lengths of that of the reconstruction


class Discriminator(nnx.Module):
    """Tells patches of pictures from patches of reconstructions (PatchGAN, Isola et al. 2017)."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        widths = (3, 32, 64, 128)
        pairs = zip(widths, widths[1:], strict=False)
        self.convs = nnx.List([nnx.Conv(a, b, (4, 4), (2, 2), rngs=rngs) for a, b in pairs])
        self.norms = nnx.List([nnx.GroupNorm(width, num_groups=8, rngs=rngs) for width in widths[2:]])
        self.out = nnx.Conv(widths[-1], 1, (3, 3), rngs=rngs)

    def __call__(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b h w 1"]:
        """The higher, the more like a picture; h and w are an eighth of H and W."""
        x = jax.nn.leaky_relu(self.convs[0](images), 0.2)
        for conv, norm in zip(self.convs[1:], self.norms, strict=True):
            x = jax.nn.leaky_relu(norm(conv(x)), 0.2)
        return self.out(x)


class Learner(NamedTuple):
    """Weights and their optimizer's state."""

    weights: nnx.State
    optimizer: optax.OptState


def batches(
    people: Float[np.ndarray, "n H W 3"], photographs: Float[np.ndarray, "m H W 3"], batch: int, side: int, seed: int
) -> Iterator[Float[np.ndarray, "b side side 3"]]:
    """Squares of random pictures, mirrored by chance, and photographs in other light and colours. The squares lie
    anywhere, also up to six pixels outside, where the edge is repeated."""
    rng, few = np.random.default_rng(seed), round(PHOTOGRAPHS * batch)
    people, photographs = (np.pad(x, ((0, 0), (6, 6), (6, 6), (0, 0)), mode="edge") for x in (people, photographs))
    while True:
        chosen = [people[i] for i in rng.integers(len(people), size=batch - few)]
        for i in rng.integers(len(photographs), size=few):
            chosen.append((photographs[i] * np.exp(rng.normal(0, 0.1, 3)) + rng.normal(0, 0.05, 3)).clip(-1, 1))
        picks = []
        for image in chosen:
            y, x = rng.integers(len(image) - side + 1, size=2)
            picks.append(image[y : y + side, x : x + side][:, :: rng.choice([-1, 1])])
        yield np.stack(picks).astype(np.float32)


def reconstruction(decoded: Float[Array, "b H W 3"], images: Float[Array, "b H W 3"]) -> Float[Array, ""]:
    """L1 of pixels, of means over squares of them, and of the differences of near pixels."""
    error = decoded - images
    total = jnp.abs(error).mean()
    for side in (2, 4, 8):
        squares = nnx.avg_pool(error, (side, side), (side, side))
        total += 0.5 * jnp.abs(squares).mean()
    for step in (1, 2, 4):
        total += 0.3 * jnp.abs(error[:, step:] - error[:, :-step]).mean()
        total += 0.3 * jnp.abs(error[:, :, step:] - error[:, :, :-step]).mean()
    return total


def adversarial(discriminator: Discriminator, images: Array, decoded: Array) -> Float[Array, ""]:
    """The discriminator's hinge loss (Lim and Ye 2017)."""
    return jax.nn.relu(1.0 - discriminator(images)).mean() + jax.nn.relu(1.0 + discriminator(decoded)).mean()


class Training:
    """Both networks and one step of them.

    Args:
        steps: of the training.
    """

    def __init__(self, steps: int) -> None:
        rate = optax.warmup_cosine_decay_schedule(0.0, _RATE, 100, steps)
        self._tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.99))
        self._adversary_tx = optax.adam(1e-3, b1=0.5, b2=0.99)
        network = AutoencoderKL(CONFIG, rngs=nnx.Rngs(0))
        bias = network.quant_conv.bias  # of means and log-variances: latents begin with little noise
        assert bias is not None
        bias[...] = bias[...].at[CHANNELS:].set(-6.0)
        self.graph, weights = nnx.split(network)
        self._adversary_graph, adversary = nnx.split(Discriminator(nnx.Rngs(1)))
        self.vae = Learner(weights, self._tx.init(weights))
        self.adversary = Learner(adversary, self._adversary_tx.init(adversary))
        self.average = weights
        self._step = jax.jit(self._update, static_argnames="against")

    def step(self, images: Float[np.ndarray, "b H W 3"], number: int, against: bool) -> Float[Array, ""]:
        """Updates the VAE and its average and, where they play `against` each other, the discriminator; returns the L1
        of pixels."""
        self.vae, self.adversary, self.average, pixels = self._step(
            self.vae, self.adversary, self.average, images, jax.random.key(number), against=against
        )
        return pixels

    def _update(
        self, vae: Learner, adversary: Learner, average: nnx.State, images: Array, key: PRNGKeyArray, against: bool
    ) -> tuple[Learner, Learner, nnx.State, Array]:
        def encode_and_decode(weights: nnx.State) -> tuple[Array, Array]:
            network = nnx.merge(self.graph, weights)
            mean, logvar = network.encode(images)
            decoded = network.decode(mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape))
            return decoded, 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar).mean()

        def length(x: Array) -> Array:
            return jnp.sqrt(jnp.square(x).sum((1, 2, 3), keepdims=True)) + 1e-12

        discriminator = nnx.merge(self._adversary_graph, adversary.weights)
        (decoded, _), pull_back = jax.vjp(encode_and_decode, vae.weights)
        wanted = jax.grad(reconstruction)(decoded, images)
        if against:
            deceived = jax.grad(lambda x: -discriminator(x).mean())(decoded)
            wanted += _ADVERSARY * deceived * length(wanted) / length(deceived)
        (grads,) = pull_back((wanted, jnp.asarray(_KL)))
        updates, optimizer = self._tx.update(grads, vae.optimizer, vae.weights)
        vae = Learner(optax.apply_updates(vae.weights, updates), optimizer)
        average = jax.tree.map(lambda a, b: _AVERAGE * a + (1.0 - _AVERAGE) * b, average, vae.weights)
        if against:
            objective = lambda weights: adversarial(nnx.merge(self._adversary_graph, weights), images, decoded)  # noqa: E731
            updates, optimizer = self._adversary_tx.update(jax.grad(objective)(adversary.weights), adversary.optimizer)
            adversary = Learner(optax.apply_updates(adversary.weights, updates), optimizer)
        return vae, adversary, average, jnp.abs(decoded - images).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("portraits", type=Path)
    parser.add_argument("people", type=Path, help="the folder of made people and framings")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=8)
    arguments = parser.parse_args()
    start()
    size = (SIZE, SIZE)
    listed = list_photographs(arguments.people / mixture.NAME, "base")
    split = [[p for p in listed if (mixture.FRAMINGS in p.id) == framing] for framing in (False, True)]
    people, framings = (load_images(some, size)[1].astype(np.float16) for some in split)
    _, heldout = load_images(list_photographs(arguments.portraits, "heldout", mirror=True), size)

    training = Training(arguments.steps)
    pieces = batches(people, framings, arguments.batch, SIZE // 2, seed=0)
    pictures = batches(people, framings, arguments.batch, SIZE, seed=1)
    with tqdm(range(arguments.steps), desc="VAE", unit="step") as bar:
        for i in bar:
            whole = i >= _CUT * arguments.steps
            pixels = training.step(next(pictures if whole else pieces), i, against=whole)
            if i % 50 == 0:
                bar.set_postfix(L1=f"{float(pixels):.3f}")
    vae = nnx.merge(training.graph, training.average)
    # Latents of unit variance, as the noise schedule expects.
    mean, _ = jax.jit(vae.encode)(jnp.asarray(people[:1000], jnp.float32))
    vae.config = type(vae.config)({**vae.config, "scaling_factor": round(1.0 / float(mean.std()), 5)})
    decoded = jax.jit(lambda x: vae.decode(vae.encode(x)[0]))(heldout)
    kept = FaceDetector().detect(jnp.clip(decoded, -1.0, 1.0)).found
    save_model(vae, arguments.portraits / "base" / "vae", dtype=np.float16)
    print(f"held-out photographs and their mirror images: L1 {float(jnp.abs(decoded - heldout).mean()):.4f}, "
          f"a face found in {int(kept.sum())} of {len(kept)}; latent deviation by channel "
          f"{np.asarray(mean.std((0, 1, 2))).round(2)}")  # fmt: skip


if __name__ == "__main__":
    command.run(main)
