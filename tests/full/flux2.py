"""FLUX.2-klein at full size against diffusers, float32: part of `bash launch/test.sh --full`.

Weights are random. Blocks and VAE take 5 GB of memory and, on two cores, a minute; the whole transformer 12 GB, as much
disk, and some minutes.
"""

import gc
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLFlux2 as TorchVAE
from diffusers import Flux2Transformer2DModel as TorchFlux2
from diffusers.models.transformers import transformer_flux2
from flax import nnx

from hgdpo_jax.models.architectures import KLEIN_4B
from hgdpo_jax.models.convert import abstract, from_torch, load_model
from hgdpo_jax.models.flux2 import (
    Flux2SingleTransformerBlock,
    Flux2Transformer2DModel,
    Flux2TransformerBlock,
    Sizes,
    rotation,
)
from hgdpo_jax.models.flux2_vae import AutoencoderKLFlux2, unpatchify
from hgdpo_jax.models.layers import SHAPES, Layers
from hgdpo_jax.models.weights import write_weights
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


def test_the_transformer_computes_what_pytorchs_does(tmp_path: Path) -> None:
    """A prompt and a picture of 256x256. Weights are bfloat16, products float32; one model in memory at a time."""
    config, rng = KLEIN_4B.configs["transformer"], np.random.default_rng(0)
    sample, text = rng.standard_normal((1, 16, 16, 128), np.float32), rng.standard_normal((1, 512, 7680), np.float32)
    sigma = np.float32([0.6])
    with torch.device("meta"):
        theirs = TorchFlux2(**{key: value for key, value in config.items() if key[0] != "_"})
    theirs = randomise(theirs.to(torch.bfloat16).to_empty(device="cpu"))
    theirs.save_config(tmp_path)
    written = {key: x.view(torch.int16).numpy().view(jnp.bfloat16) for key, x in theirs.state_dict().items()}
    write_weights(tmp_path / "diffusion_pytorch_model.safetensors", written, jnp.bfloat16)
    del written
    for module in theirs.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.RMSNorm):
            module.register_forward_pre_hook(_widen)
            module.register_forward_hook(_narrow)
    zero, grid, words = torch.arange(1), torch.arange(16), torch.arange(512)
    ids = [torch.cartesian_prod(zero, grid, grid, zero), torch.cartesian_prod(zero, zero, zero, words)]
    with torch.no_grad():
        expected = theirs(
            torch.tensor(sample).flatten(1, 2), torch.tensor(text), torch.tensor(sigma), *ids
        ).sample.reshape(sample.shape)
    del theirs
    gc.collect()
    ours = load_model(Flux2Transformer2DModel, tmp_path, jnp.float32, jnp.bfloat16)
    x, at, context = map(jnp.asarray, (sample, sigma, text))
    found = ours(x, at, ours.read_text(context))  # not compiled as one: that would widen all weights at once
    assert found.dtype == jnp.float32 and expected.dtype == torch.float32
    error = deviations(found, expected)
    print(f"\ntransformer: largest error {error:.2e} standard deviations")
    assert error <= 1e-4


def _widen(module: torch.nn.Module, inputs: Any) -> None:
    """In place of the weights those in float32, until the module has computed."""
    module.kept = {name: parameter.data for name, parameter in module.named_parameters()}
    for parameter in module.parameters():
        parameter.data = parameter.data.float()


def _narrow(module: torch.nn.Module, inputs: Any, output: Any) -> None:
    for name, parameter in module.named_parameters():
        parameter.data = module.kept[name]
