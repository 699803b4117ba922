"""The VAE against diffusers'."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as TorchVAE
from flax import nnx

from hgdpo_jax.models.vae import AutoencoderKL
from hgdpo_jax.run.errors import UserError
from tests.models.parity import ported, randomise, relative_error
from tests.rounding import NETWORK, assert_close
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
    assert relative_error(mean, moments.mean) <= NETWORK
    assert relative_error(logvar, moments.logvar) <= NETWORK
    assert relative_error(nnx.jit(lambda m, x: m.decode(x))(ours, latents), decoded) <= NETWORK


def test_scaling_is_undone() -> None:
    vae = random_model(AutoencoderKL, CONFIG | {"scaling_factor": 0.5}, 0)
    images = np.random.default_rng(0).uniform(-1, 1, (1, 8, 8, 3)).astype(np.float32)
    mean, _ = nnx.jit(lambda m, x: m.encode(x))(vae, images)
    assert_close(nnx.jit(lambda m, x: m.to_latents(x))(vae, images), mean * 0.5, NETWORK)
    scaled, decoded = nnx.jit(lambda m, x: (m.to_images(x * 0.5), m.decode(x)))(vae, mean)
    assert_close(scaled, np.clip(decoded, -1, 1), NETWORK)


def test_a_config_value_that_is_not_implemented_is_named() -> None:
    with pytest.raises(UserError, match="shift_factor=0.1"):
        AutoencoderKL(CONFIG | {"shift_factor": 0.1}, rngs=nnx.Rngs(0))
