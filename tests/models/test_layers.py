"""Convolutions over few pixels and over a map that is doubled, and GroupNorm, are the same as plain ones."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hgdpo_jax.models.layers import conv, group_norm
from hgdpo_jax.training.cost import operations
from tests.rounding import EPS, assert_close


@pytest.mark.parametrize("bias", [True, False])
def test_few_pixels_are_convolved_as_one_product(bias: bool) -> None:
    ours = conv(40, 24, 3, bias=bias, rngs=nnx.Rngs(0), dtype=jnp.float32)
    if bias:
        ours.bias[...] = jnp.arange(24.0)

    def theirs(x: jax.Array) -> jax.Array:
        return nnx.Conv.__call__(ours, x)

    for shape, one_product in (((2, 3, 4, 40), True), ((2, 4, 5, 40), False)):
        x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
        assert ("conv_general_dilated" not in str(jax.make_jaxpr(ours)(x))) == one_product
        assert_close(ours(x), theirs(x), 40 * EPS)  # sums of 360 products in another order
        gradients = (jax.grad(lambda x, f=f: jnp.sin(f(x)).sum())(x) for f in (ours, theirs))
        assert_close(*gradients, 40 * EPS)


def test_a_described_device_decides_whether_they_are() -> None:
    ours, x = conv(40, 24, 3, rngs=nnx.Rngs(0), dtype=jnp.float32), jnp.ones((2, 3, 4, 40))
    for platform, one_product in (("cpu", True), ("cuda", False), ("tpu", False)):
        ours.sharding = SimpleNamespace(mesh=SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)])))
        assert ("conv_general_dilated" not in str(jax.make_jaxpr(lambda x: ours(x))(x))) == one_product


@pytest.mark.parametrize(("shape", "one_product"), [((2, 3, 4, 40), True), ((2, 4, 5, 40), False)])
def test_a_doubled_map_is_convolved_with_four_ninths_of_the_operations(
    shape: tuple[int, ...], one_product: bool
) -> None:
    ours, x = conv(40, 24, 3, rngs=nnx.Rngs(0), dtype=jnp.float32), jnp.ones(shape)
    ours.bias[...] = jnp.arange(24.0)

    def theirs(x: jax.Array) -> jax.Array:
        return nnx.Conv.__call__(ours, x.repeat(2, 1).repeat(2, 2))

    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    assert ("conv_general_dilated" not in str(jax.make_jaxpr(ours.doubled)(x))) == one_product
    assert_close(ours.doubled(x), theirs(x), 40 * EPS)  # sums of 360 products in another order
    gradients = (jax.grad(lambda x, f=f: jnp.sin(f(x)).sum())(x) for f in (ours.doubled, theirs))
    assert_close(*gradients, 40 * EPS)
    four, nine = (operations(jax.make_jaxpr(f)(x).jaxpr) for f in (ours.doubled, theirs))
    assert four * 9 == nine * 4


@pytest.mark.parametrize(("dtype", "far"), [("float32", 0.0), ("float32", 100.0), ("bfloat16", 0.0)])
def test_groups_are_normalised_whatever_is_added_up_first(dtype: str, far: float) -> None:
    ours = group_norm(24, 4, 1e-5, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype))
    rng = np.random.default_rng(0)
    ours.scale[...], ours.bias[...] = (jnp.asarray(rng.standard_normal(24), jnp.float32) for _ in range(2))
    x = jnp.asarray(rng.standard_normal((2, 5, 4, 24)) * np.linspace(1, 9, 24) + far, dtype)
    groups = np.asarray(x, np.float64).reshape(2, 20, 4, 6)
    expected = (groups - groups.mean((1, 3), keepdims=True)) / np.sqrt(groups.var((1, 3), keepdims=True) + 1e-5)
    expected = expected.reshape(x.shape) * np.asarray(ours.scale[...]) + np.asarray(ours.bias[...])
    found = ours(x)
    assert found.dtype == x.dtype
    rounding = float(jnp.finfo(dtype).eps) + 20 * EPS  # of the result; and of the sums, of x in each of which `far` is
    assert_close(found, expected, rounding + 4 * EPS * far)

    def loss(norm: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
        return jnp.sin(norm(x).astype(jnp.float32)).sum()

    theirs = partial(nnx.GroupNorm.__call__, ours)
    gradients = [np.asarray(jax.grad(loss, 1)(norm, x), np.float64) for norm in (ours, theirs)]
    assert_close(*gradients, 4 * rounding + 4 * EPS * far)
