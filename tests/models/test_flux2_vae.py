"""The VAE of FLUX.2 against diffusers', and its statistics, which are no parameters."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLFlux2 as TorchVAE
from diffusers import Flux2KleinPipeline
from flax import nnx
from safetensors.torch import load_file

from hgdpo_jax.models.convert import abstract, load_model, require_fit, save_model, to_torch
from hgdpo_jax.models.flux2_vae import AutoencoderKLFlux2, patchify, unpatchify
from hgdpo_jax.models.weights import open_folder
from hgdpo_jax.run.errors import UserError
from tests.klein import VAE as CONFIG
from tests.models.parity import deviations, numpy_weights, ported, randomise
from tests.rounding import NETWORK, assert_close

TOLERANCE = 1e-4  # of an output's deviation


@pytest.fixture(scope="module")
def theirs() -> TorchVAE:
    """Random, and its statistics too."""
    model = randomise(TorchVAE(**CONFIG))
    model.bn.running_mean.normal_(generator=torch.Generator().manual_seed(1))
    model.bn.running_var.uniform_(2.9, 3.5)
    model.bn.num_batches_tracked.fill_(123_456)
    return model


def last(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1)


def test_images_and_latents_are_those_of_the_pipeline(theirs: TorchVAE) -> None:
    """Whatever scaling_factor says, which its VAE does not know; a picture is not a square."""
    rng = np.random.default_rng(0)
    images, latents = (
        rng.uniform(-1, 1, (2, 12, 8, 3)).astype(np.float32),
        rng.standard_normal((2, 3, 2, 16), np.float32),
    )
    pipeline = Flux2KleinPipeline.__new__(Flux2KleinPipeline)  # its methods need the VAE alone
    object.__setattr__(pipeline, "vae", theirs)
    with torch.no_grad():
        posterior = theirs.encode(torch.tensor(images).permute(0, 3, 1, 2)).latent_dist
        encoded = pipeline._encode_vae_image(torch.tensor(images).permute(0, 3, 1, 2), None)
        mean, deviation = theirs.bn.running_mean[:, None, None], (theirs.bn.running_var + 1e-4).sqrt()[:, None, None]
        raw = pipeline._unpatchify_latents(torch.tensor(latents).permute(0, 3, 1, 2) * deviation + mean)
        decoded = theirs.decode(raw).sample
    ours = ported(AutoencoderKLFlux2, {**theirs.config, "scaling_factor": 0.5}, theirs)

    @nnx.jit
    def run(m: AutoencoderKLFlux2, x: jax.Array, z: jax.Array) -> tuple[jax.Array, ...]:
        raw = unpatchify(m.bn.denormalised(z))
        return *m.encode(x), m.to_latents(x), raw, m.decode(raw), m.to_images(z)

    *found, clipped = run(ours, images, latents)
    for one, other in zip(found, (posterior.mean, posterior.logvar, encoded, raw, decoded), strict=True):
        assert deviations(one, last(other)) <= TOLERANCE
    assert_close(clipped, np.clip(found[-1], -1, 1), NETWORK)
    assert ours.pixels_per_latent == 4 and abstract(AutoencoderKLFlux2, {}).pixels_per_latent == 16
    patches = patchify(jnp.asarray(found[0]))
    assert_close(patches, last(pipeline._patchify_latents(posterior.mean)), NETWORK)
    assert patches[1, 2, 1, 4 * 3 + 2 * 1 + 0] == found[0][1, 2 * 2 + 1, 2 * 1 + 0, 3]
    np.testing.assert_array_equal(unpatchify(patches), found[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_folders_round_trip_through_diffusers_with_their_statistics(
    theirs: TorchVAE, dtype: str, tmp_path: Path
) -> None:
    """Bit for bit, and PyTorch's count as well; only parameters are trained, and only they take the dtype asked for."""
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(AutoencoderKLFlux2, tmp_path / "theirs", param_dtype=jnp.dtype(dtype))
    trained = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(ours, nnx.Param))}
    assert not any("bn" in name for name in trained) and len(trained) == len(numpy_weights(theirs)) - 3
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(ours, nnx.Param))} == {jnp.dtype(dtype)}
    assert ours.bn.running_var[...].dtype == jnp.float32
    assert to_torch(ours)["bn.num_batches_tracked"].dtype == np.int64
    save_model(ours, tmp_path / "ours", jnp.dtype(dtype))
    (path,) = (tmp_path / "ours").glob("*.safetensors")
    again, kept = load_file(path), TorchVAE(**CONFIG)
    kept.load_state_dict(again, strict=True)
    found, report = TorchVAE.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for key, value in theirs.state_dict().items():
        kind = torch.int64 if key.endswith("tracked") else getattr(torch, dtype)
        assert again[key].dtype == kind and torch.equal(again[key], value.to(kind))
        assert torch.equal(found.state_dict()[key], value.to(kind).to(value.dtype))


def test_a_file_without_statistics_is_refused(theirs: TorchVAE, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path)
    weights = {key: value for key, value in open_folder(tmp_path).items() if key != "bn.running_var"}
    with pytest.raises(UserError, match=r"vae: weight bn\.running_var is missing"):
        require_fit(weights, abstract(AutoencoderKLFlux2, CONFIG), "vae")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"decoder_block_out_channels": [96, 192, 384, 384]},
            "VAE config decoder_block_out_channels=.*: not supported",
        ),
        ({"patch_size": [1, 1]}, r"VAE config patch_size=\[1, 1\]: not supported"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "AttnDownEncoderBlock2D"),
    ],
)
def test_a_config_value_that_is_not_implemented_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        abstract(AutoencoderKLFlux2, CONFIG | change)
    assert "\n" not in str(error.value)
