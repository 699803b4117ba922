"""Blocks and VAE of FLUX.2-klein at full size against diffusers, float32: part of `bash launch/test.sh --full`.

Weights are random. Takes 5 GB of memory and, on two cores, a minute. That the whole transformer has diffusers' names
and shapes is in tests/models.
"""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLFlux2 as TorchVAE
from diffusers.models.transformers import transformer_flux2
from flax import nnx

from hgdpo_jax.models.convert import abstract, from_torch
from hgdpo_jax.models.flux2 import Flux2SingleTransformerBlock, Flux2TransformerBlock, Sizes, rotation
from hgdpo_jax.models.flux2_vae import AutoencoderKLFlux2, unpatchify
from hgdpo_jax.models.layers import SHAPES, Layers
from tests.models.parity import deviations, numpy_weights, randomise

SIZES = Sizes(width=3072, heads=24, hidden=9216, eps=1e-6)
TEXT, HEIGHT, WIDTH = 64, 12, 16


@pytest.mark.parametrize("kind", ["double", "single"])
def test_a_block_computes_what_pytorchs_does(kind: str) -> None:
    rng, single = np.random.default_rng(0), kind == "single"
    text, image = (rng.standard_normal((1, n, SIZES.width), np.float32) for n in (TEXT, HEIGHT * WIDTH))
    mods = [0.5 * rng.standard_normal((1, (3 if single else 6) * SIZES.width), np.float32) for _ in (text, image)]
    by = rotation(TEXT, HEIGHT, WIDTH, (32,) * 4, 2000.0)
    of_torch = transformer_flux2.Flux2SingleTransformerBlock if single else transformer_flux2.Flux2TransformerBlock
    theirs = randomise(of_torch(SIZES.width, SIZES.heads, SIZES.width // SIZES.heads))
    given, rope = [torch.tensor(x) for x in (image, text, *mods[::-1])], tuple(map(torch.tensor, by))
    with torch.no_grad():
        expected = theirs(*given[:3], rope) if single else torch.cat(theirs(*given, rope), 1)
    ours = (Flux2SingleTransformerBlock if single else Flux2TransformerBlock)(SIZES, Layers(SHAPES, jnp.float32))
    from_torch(numpy_weights(theirs), ours)
    del theirs
    gc.collect()
    text, image, *mods = (jnp.asarray(x) for x in (text, image, *(mod[:, None] for mod in mods)))

    @nnx.jit
    def run(block: nnx.Module) -> jax.Array:
        if single:
            return block(jnp.concatenate([text, image], 1), mods[1], by)
        return jnp.concatenate(block((text, image), tuple(mods), by), 1)

    error = deviations(run(ours), expected)
    print(f"\n{kind} block: largest error {error:.2e} standard deviations")
    assert error <= 1e-4


def test_the_vae_computes_what_pytorchs_does() -> None:
    """Which computes in float64: in float32 its own sums are as wrong as ours."""
    theirs, rng = randomise(TorchVAE()), np.random.default_rng(0)
    theirs.bn.running_mean.normal_(generator=torch.Generator().manual_seed(1))
    theirs.bn.running_var.uniform_(2.9, 3.5)
    ours = abstract(AutoencoderKLFlux2, dict(theirs.config))
    from_torch(numpy_weights(theirs), ours)
    theirs.double()
    images = rng.uniform(-1, 1, (1, 128, 128, 3)).astype(np.float32)
    latents = rng.standard_normal((1, 8, 8, 128), np.float32)

    @nnx.jit
    def run(m: AutoencoderKLFlux2, x: jax.Array, z: jax.Array) -> tuple[jax.Array, ...]:
        raw = unpatchify(m.bn.denormalised(z))
        return m.encode(x)[0], raw, m.decode(raw)

    encoded, raw, decoded = run(ours, jnp.asarray(images), jnp.asarray(latents))
    with torch.no_grad():
        mean = theirs.encode(torch.tensor(images).double().permute(0, 3, 1, 2)).latent_dist.mean
        sample = theirs.decode(torch.tensor(np.asarray(raw)).double().permute(0, 3, 1, 2)).sample
    errors = [deviations(x, y.permute(0, 2, 3, 1)) for x, y in ((encoded, mean), (decoded, sample))]
    print(f"\nVAE: largest error {errors[0]:.2e} encoding, {errors[1]:.2e} decoding, in standard deviations")
    assert max(errors) <= 1e-4
