"""What float16 and bfloat16 make of the step: gradients that do not vanish, margins that mean something."""

from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hgdpo_jax.devices.transfer import to_devices
from hgdpo_jax.devices.xla import use_precision
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.training import loss_scale
from hgdpo_jax.training.loss_scale import FIRST
from hgdpo_jax.training.metrics import MetricLog
from hgdpo_jax.training.optimizer import numbers_of
from hgdpo_jax.training.step import Metrics, TrainState
from tests import tiny
from tests.training.test_step import batch, program


def step(two_levels: Path, dtype: str, loss_scale: float | None = None, **numbers: float) -> tuple[TrainState, Metrics]:
    """A step of a policy against one that is next to it."""
    compiled = program(two_levels, tiny.mesh(), dtype=dtype)
    signs = np.random.default_rng(0)
    policy = compiled.policy
    reference = jax.tree.map(lambda x: x + 1e-6 * signs.choice([-1.0, 1.0], x.shape).astype(np.float32), policy)
    arguments = (reference, compiled.frozen, to_devices(batch(), tiny.mesh()))
    numbers = {name: np.float32(value) for name, value in numbers.items()}
    state = compiled.start(policy)
    if loss_scale is not None:
        where = optax.tree.get(state.optimizer, "loss_scale").sharding  # elsewhere the step would be compiled again
        scale = jax.device_put(np.float32(loss_scale), where)
        state = state._replace(optimizer=optax.tree.set(state.optimizer, loss_scale=scale))
    return compiled.step(state, *arguments, lambda_stat=np.float32(0.0), **numbers)


@cache
def measured(two_levels: Path, dtype: str) -> tuple[float, np.ndarray]:
    """(mean margin of a policy against one that is next to it, at κ = 2500; its gradient at κ = 50, times a
    constant)."""
    noise = float(step(two_levels, dtype, beta=5000.0)[1]["dpo/margin_deviation"])
    state, found = step(two_levels, dtype, beta=100.0)
    values = [x for x in jax.tree.leaves((state.policy, state.optimizer, found)) if jnp.issubdtype(x.dtype, float)]
    assert all(x.dtype == jnp.float32 for x in values)
    return noise, np.asarray(optax.tree.get(state.optimizer, "mu"))


@pytest.mark.parametrize(("dtype", "bits"), [("float16", 11), ("bfloat16", 8)])
def test_gradients_are_those_of_float32_as_far_as_the_bits_go(two_levels: Path, dtype: str, bits: int) -> None:
    wanted, found = measured(two_levels, "float32")[1], measured(two_levels, dtype)[1]
    # Weights and every value in between are rounded, by half of a last bit: some hundred times there and back.
    assert np.linalg.norm(found - wanted) <= 64 * 2.0**-bits * np.linalg.norm(wanted)


def test_margins_in_float16_have_a_fraction_of_the_noise_of_bfloat16(two_levels: Path) -> None:
    """The policies are so near to each other that their margins are rounding, but for float32's."""
    noise = {dtype: measured(two_levels, dtype)[0] for dtype in ("float32", "float16", "bfloat16")}
    assert noise["float32"] < noise["float16"] < noise["bfloat16"] / 3  # it is eight times as fine


def test_an_overflow_of_float16_skips_its_step_and_halves_the_scale(two_levels: Path, tmp_path: Path) -> None:
    config, log = tiny.config(two_levels), MetricLog(tmp_path, 0)
    config.model.dtype = "float16"
    assert numbers_of(config, 0).least_scale == 1.0
    before = program(two_levels, tiny.mesh(), dtype="float16").policy
    state, found = step(two_levels, "float16", loss_scale=2.0**100, least_scale=1.0)
    assert found["loss_scale"] == 2.0**99 and found["skipped_steps"] == 1 and state.step == 1
    jax.tree.map(np.testing.assert_array_equal, state.policy, before)
    assert not optax.tree.get(state.optimizer, "mu").any()
    log.add(1, found)
    state, found = step(two_levels, "float16", least_scale=1.0)
    assert found["loss_scale"] == FIRST and found["skipped_steps"] == 0 and optax.tree.get(state.optimizer, "mu").any()
    log.add(2, found)
    assert log.means()["loss/total"] > 0.0  # both are fit to go on with


def test_training_stops_where_a_gradient_is_not_finite_and_no_smaller_scale_may_help(
    two_levels: Path, tmp_path: Path
) -> None:
    config, log = tiny.config(two_levels), MetricLog(tmp_path, 0)
    for dtype in ("float32", "tf32", "bfloat16"):
        config.model.dtype = dtype
        assert numbers_of(config, 0).least_scale == np.inf
    log.add(2, step(two_levels, "float16", loss_scale=2.0**100, least_scale=2.0**100)[1])
    with pytest.raises(UserError, match="gradient_norm is (nan|inf) at step 2.*--config.model.dtype=bfloat16"):
        log.means()


def test_the_scale_is_doubled_after_many_steps_and_changes_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "DOUBLED_AFTER", 2)
    monkeypatch.setattr(loss_scale, "LARGEST", 4 * FIRST)
    tx, params = loss_scale.with_loss_scale(optax.adam(0.1)), {"x": jnp.array([1.0, -2.0])}
    plain, state, scales = optax.adam(0.1), tx.init(params), []
    expected, gradient = plain.init(params), {"x": jnp.array([0.3, 1e-7])}
    for _ in range(7):
        scales.append(float(state.loss_scale) / FIRST)
        scaled = jax.tree.map(lambda g, s=state.loss_scale: s * g, gradient)
        update, state = tx.update(scaled, state, params, least_scale=1.0)
        wanted, expected = plain.update(gradient, expected, params)
        np.testing.assert_array_equal(update["x"], wanted["x"])
    assert scales == [1, 1, 2, 2, 4, 4, 4]
    _, state = tx.update({"x": jnp.array([jnp.inf, 0.0])}, state, params, least_scale=1.0)
    assert state.loss_scale == 2 * FIRST and state.skipped_steps == 1 and state.steps == 0


def test_float32_products_are_exact_unless_tf32_is_asked_for() -> None:
    """On every device: products of a program say how many bits they need."""
    try:
        for dtype, wanted in (("float32", "HIGHEST"), ("tf32", "HIGH"), ("bfloat16", "HIGH")):
            use_precision(dtype)
            text = jax.jit(lambda x: x @ x).lower(jnp.ones((8, 8))).as_text()
            assert f"precision = [{wanted}, {wanted}]" in text
    finally:
        jax.config.update("jax_default_matmul_precision", None)
