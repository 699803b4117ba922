"""The VAE against diffusers'."""

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as TorchVAE
from flax import nnx

from hgdpo_jax.models.vae import AutoencoderKL
from hgdpo_jax.run.errors import UserError
from tests.models.parity import ported, randomise, relative_error
from tests.rounding import NETWORK, assert_close

CONFIG = dict(
    block_out_channels=(8, 16),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=4,
)


@pytest.mark.parametrize("quant", [True, False])
def test_encode_and_decode_are_diffusers_and_scaling_is_undone(quant: bool) -> None:
    theirs = randomise(TorchVAE(**CONFIG, use_quant_conv=quant, use_post_quant_conv=quant, scaling_factor=0.5))
    ours = ported(AutoencoderKL, dict(theirs.config), theirs)
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, 12, 8, 3)).astype(np.float32)
    latents = rng.standard_normal((2, 6, 4, 4), np.float32)
    with torch.no_grad():
        moments = theirs.encode(torch.tensor(images.transpose(0, 3, 1, 2))).latent_dist
        expected = theirs.decode(torch.tensor(latents.transpose(0, 3, 1, 2))).sample

    @nnx.jit
    def run(m: AutoencoderKL, x: jax.Array, z: jax.Array) -> tuple:
        return *m.encode(x), m.to_latents(x), m.decode(z), m.to_images(0.5 * z)

    mean, logvar, scaled, decoded, clipped = run(ours, images, latents)
    assert relative_error(mean, moments.mean) <= NETWORK
    assert relative_error(logvar, moments.logvar) <= NETWORK
    assert relative_error(decoded, expected) <= NETWORK
    assert_close(scaled, 0.5 * mean, NETWORK)
    assert_close(clipped, np.clip(decoded, -1, 1), NETWORK)
    assert np.abs(decoded).max() > 1


def test_a_config_value_that_is_not_implemented_is_named() -> None:
    with pytest.raises(UserError, match="shift_factor=0.1"):
        AutoencoderKL(CONFIG | {"shift_factor": 0.1}, rngs=nnx.Rngs(0))
