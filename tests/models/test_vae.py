"""The VAE against diffusers'."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as TorchVAE
from flax import nnx

from hgdpo_jax.errors import UserError
from hgdpo_jax.models.vae import AutoencoderKL
from tests.models.parity import ported, randomise, relative_error
from tests.tiny import random_model

CONFIG = dict(
    block_out_channels=(16, 32, 32),
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    layers_per_block=2,
    latent_channels=4,
    norm_num_groups=8,
)


@pytest.mark.parametrize("quant", [True, False])
def test_encode_and_decode_are_diffusers(quant: bool) -> None:
    theirs = randomise(TorchVAE(**CONFIG, use_quant_conv=quant, use_post_quant_conv=quant))
    ours = ported(AutoencoderKL, dict(theirs.config), theirs)
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, 24, 16, 3)).astype(np.float32)
    latents = rng.standard_normal((2, 6, 4, 4), np.float32)
    with torch.no_grad():
        moments = theirs.encode(torch.tensor(images.transpose(0, 3, 1, 2))).latent_dist
        decoded = theirs.decode(torch.tensor(latents.transpose(0, 3, 1, 2))).sample
    mean, logvar = nnx.jit(lambda m, x: m.encode(x))(ours, images)
    assert relative_error(mean, moments.mean) <= 2e-5
    assert relative_error(logvar, moments.logvar) <= 2e-5
    assert relative_error(nnx.jit(lambda m, x: m.decode(x))(ours, latents), decoded) <= 2e-5


def test_scaling_is_undone() -> None:
    vae = random_model(AutoencoderKL, CONFIG | {"scaling_factor": 0.5}, 0)
    images = np.random.default_rng(0).uniform(-1, 1, (1, 8, 8, 3)).astype(np.float32)
    mean, logvar = vae.encode(images)
    assert np.array_equal(vae.to_latents(images), mean * 0.5)
    noise = np.ones_like(mean)
    assert np.allclose(vae.to_latents(images, noise), (mean + np.exp(0.5 * logvar)) * 0.5, atol=1e-6)
    assert np.allclose(vae.to_images(mean * 0.5), np.clip(vae.decode(mean), -1, 1), atol=1e-6)


def test_a_config_value_that_is_not_implemented_is_named() -> None:
    with pytest.raises(UserError, match="shift_factor=0.1"):
        AutoencoderKL(CONFIG | {"shift_factor": 0.1}, rngs=nnx.Rngs(0))
