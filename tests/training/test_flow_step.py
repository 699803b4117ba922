"""A step of the curriculum on a flow model, against PyTorch and an independent formula in float64."""

from pathlib import Path
from typing import Any
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from diffusers import Flux2Transformer2DModel as TorchFlux2
from flax import nnx
from jax.flatten_util import ravel_pytree
from ml_collections import ConfigDict

from hgdpo_jax.devices.sharding import tree_shardings
from hgdpo_jax.devices.transfer import to_devices
from hgdpo_jax.models.convert import to_torch
from hgdpo_jax.models.lora import lora_layers, merge_lora
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.training import step as steps
from hgdpo_jax.training.inputs import loss_of
from hgdpo_jax.training.optimizer import make_optimizer, numbers_of
from hgdpo_jax.training.policy import load_trainable, set_policy
from tests import klein, tiny
from tests.rounding import GRADIENT, MEAN, assert_close

LATENT, BETA, WEIGHT, SHIFT = (4, 6, 16), 20.0, 1e7, 3.0


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return klein.write(tmp_path_factory.mktemp("klein"))


def config_of(base: Path, **train: Any) -> ConfigDict:
    levels = {"noise_levels": "logit_normal", "noise_shift": SHIFT, "lora_modules": ("attention", "feed_forward")}
    config = tiny.config(base, **levels | train)
    config.train.update(beta=BETA, lambda_stat=WEIGHT, clip_norm=0.0)
    return config


def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    latents = rng.standard_normal((2, 8, *LATENT)).astype(np.float16)
    ids = rng.integers(0, 256, (8, klein.TOKENS + 77), dtype=np.int32)
    ids[:, 30 : klein.TOKENS] = klein.tokenizer().pad_token_id
    return {"winner": latents[0], "loser": latents[1], "input_ids": ids}


def one_step(base: Path, mesh: Any) -> tuple[Any, Any, Any, dict[str, Any], steps.TrainState]:
    """(pipeline, policy, reference, metrics, state) of one step from a LoRA that has learnt something."""
    config = config_of(base)
    pipeline = load_trainable(config, mesh)
    denoiser, reference, frozen = steps.split_params(pipeline, "lora")
    policy = jax.tree.map_with_path(
        lambda path, x: x + 0.2 * jax.random.normal(jax.random.key(crc32(str(path).encode())), x.shape), reference
    )
    tx = make_optimizer(config.train)
    placed = tree_shardings(jax.eval_shape(lambda p: steps.init_state(p, tx, 0.0), policy), mesh)
    state = jax.jit(lambda p: steps.init_state(p, tx, 0.0), out_shardings=placed)(policy)
    step = steps.make_step(loss_of(config, denoiser, pipeline.schedule, mesh), tx, 1, placed)
    state, metrics = step(state, reference, frozen, to_devices(batch(), mesh), numbers_of(config, 0))
    return pipeline, policy, reference, jax.device_get(metrics), state


def test_loss_and_gradient_equal_pytorchs(base: Path) -> None:
    pipeline, policy, reference, metrics, state = one_step(base, tiny.mesh())
    _, unravel = ravel_pytree(policy)  # the optimizer has all numbers of a LoRA in one row
    gradient = unravel(jnp.ravel(optax.tree.get(state.optimizer, "mu")) / (1.0 - 0.9))  # decays by 0.9

    first_step = jax.random.fold_in(numbers_of(config_of(base), 0).stage_key, 0)
    keys = jax.vmap(lambda i: jax.random.fold_in(first_step, i))(jnp.arange(8))
    sigma, noise = (np.array(x, np.float64) for x in steps._noise(keys, LATENT, pipeline.schedule))
    data = batch()
    context = torch.tensor(np.asarray(pipeline.text(jnp.asarray(data["input_ids"]), (16, 24)).encoder_hidden_states))

    def torch_transformer(lora: Any) -> TorchFlux2:
        set_policy(pipeline, lora)
        merge_lora(pipeline.denoiser)
        model = TorchFlux2(**klein.TRANSFORMER)
        model.load_state_dict({key: torch.tensor(value) for key, value in to_torch(pipeline.denoiser).items()})
        set_policy(pipeline, lora)  # B is zero again where it was merged: the kernel keeps it
        for layer in lora_layers(pipeline.denoiser).values():
            layer.kernel[...] -= layer.scale * (layer.lora_A[...] @ layer.lora_B[...])
        return model.double()

    rows, columns = np.indices(LATENT[:2]).reshape(2, -1)
    image_ids = torch.tensor(np.stack([0 * rows, rows, columns, 0 * rows], 1))
    text_ids = torch.tensor([[0, 0, 0, i] for i in range(klein.TOKENS)])

    def error_and_mean(model: TorchFlux2, latent: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        x, at = latent.astype(np.float64), sigma[:, None, None, None]
        x_sigma = torch.tensor((1 - at) * x + at * noise).reshape(8, -1, LATENT[-1])
        found = model(
            hidden_states=x_sigma, timestep=torch.tensor(sigma), guidance=None, encoder_hidden_states=context.double(),
            txt_ids=text_ids, img_ids=image_ids, return_dict=False,
        )[0]  # fmt: skip
        velocity = torch.tensor(noise - x).reshape(found.shape)
        return (found - velocity).square().mean((1, 2)), found.mean(1)

    theirs, ref = torch_transformer(policy), torch_transformer(reference).requires_grad_(False)
    (winner, mean), (loser, _) = (error_and_mean(theirs, data[name]) for name in ("winner", "loser"))
    (ref_winner, ref_mean), (ref_loser, _) = (error_and_mean(ref, data[name]) for name in ("winner", "loser"))
    z = -0.5 * BETA * ((winner - ref_winner) - (loser - ref_loser))
    statistics = ((ref_mean - mean) * torch.tensor(np.minimum(sigma, 1e-3))[:, None]).square().sum(1).mean()
    assert WEIGHT * statistics.item() > 1e-3 and z.std() > 0.1
    expected = torch.log1p(torch.exp(-z)).mean() + WEIGHT * statistics
    expected.backward()
    errors = float(metrics["error/winner"] + metrics["error/loser"])
    assert_close(metrics["loss/total"], expected.item(), MEAN, size=0.5 * BETA * errors)

    grads = {key: p.grad.numpy() for key, p in theirs.named_parameters() if p.grad is not None}
    flat = nnx.to_flat_state(gradient["transformer"])
    of_lora = {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in flat}
    found, wanted = [], []
    set_policy(pipeline, policy)
    for path, layer in lora_layers(pipeline.denoiser).items():
        of_kernel = layer.scale * grads[f"{path}.weight"].T  # W + s · A B
        wanted += [of_kernel @ np.asarray(layer.lora_B[...]).T, np.asarray(layer.lora_A[...]).T @ of_kernel]
        found += [of_lora[f"{path}.{name}"] for name in ("lora_A", "lora_B")]
    assert len(found) == 2 * (12 + 2 * 2)  # a double block's, and two single ones'
    largest = max(np.abs(x).max() for x in wanted)
    assert max(np.abs(a - b).max() for a, b in zip(found, wanted, strict=True)) / largest <= GRADIENT


def test_eight_devices_train_as_one_does(base: Path) -> None:
    *_, one, first = one_step(base, tiny.mesh())
    *_, eight, second = one_step(base, tiny.mesh(2, 2, 2))
    size = 0.5 * BETA * float(one["error/winner"] + one["error/loser"])
    assert_close(eight["loss/total"], one["loss/total"], MEAN, size=size)
    a, b = (jnp.concatenate([x.ravel() for x in jax.tree.leaves(jax.device_get(optax.tree.get(state.optimizer, "mu")))])
            for state in (first, second))  # fmt: skip
    assert_close(b, a, 2 * GRADIENT)


@pytest.mark.parametrize("train, message", [
    ({"params": "text_lora"}, "train.params=text_lora: not for FLUX.2-klein; expects lora or all"),
    ({"blocks": "up"}, "train.blocks=up: this model is a transformer"),
])  # fmt: skip
def test_what_only_a_unet_has_is_refused(base: Path, train: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_trainable(config_of(base, **train), tiny.mesh())


def test_noise_levels_of_a_flow_are_refused_for_other_models(tmp_path: Path) -> None:
    tiny.write_base(tmp_path, tiny.ONE_LEVEL)
    with pytest.raises(UserError, match="noise_levels=logit_normal, train.noise_shift=3: are of a flow model"):
        load_trainable(tiny.config(tmp_path, noise_levels="logit_normal", noise_shift=3.0), tiny.mesh())
