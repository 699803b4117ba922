"""Convolutions over few pixels and over a map that is doubled, and GroupNorm, are the same as plain ones."""

from collections.abc import Callable
from functools import partial
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from hgdpo_jax.models.layers import Layers
from hgdpo_jax.training.cost import operations
from tests.rounding import EPS, assert_close

MAKE = Layers(nnx.Rngs(0), jnp.float32)


def with_gradient(f: Callable[[jax.Array], jax.Array], x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """f of x and the gradient of a sum over it, in one program."""

    def loss(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = f(x)
        return jnp.sin(out.astype(jnp.float32)).sum(), out

    gradient, out = jax.jit(jax.grad(loss, has_aux=True))(x)
    return out, gradient


@pytest.mark.parametrize(("shape", "one_product"), [((2, 3, 4, 40), True), ((2, 4, 5, 40), False)])
def test_convolutions_are_the_plain_ones(shape: tuple[int, ...], one_product: bool) -> None:
    """Few pixels are convolved as one product; a doubled map with four ninths of the operations."""
    ours, x = MAKE.conv(40, 24, 3), jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    ours.bias[...] = jnp.arange(24.0)

    def theirs(x: jax.Array) -> jax.Array:
        return nnx.Conv.__call__(ours, x)

    def theirs_doubled(x: jax.Array) -> jax.Array:
        return theirs(x.repeat(2, 1).repeat(2, 2))

    for f, expected in ((ours, theirs), (ours.doubled, theirs_doubled)):
        assert ("conv_general_dilated" not in str(jax.make_jaxpr(f)(x))) == one_product
        for one, other in zip(with_gradient(f, x), with_gradient(expected, x), strict=True):
            assert_close(one, other, 40 * EPS)  # sums of 360 products in another order
    four, nine = (operations(jax.make_jaxpr(f)(x).jaxpr) for f in (ours.doubled, theirs_doubled))
    assert four * 9 == nine * 4
    bare = MAKE.conv(40, 24, 3, bias=False)
    assert_close(bare(x), nnx.Conv.__call__(bare, x), 40 * EPS)


def test_a_described_device_decides_whether_few_pixels_are_one_product() -> None:
    ours, x = MAKE.conv(40, 24, 3), jnp.ones((2, 3, 4, 40))
    for platform, one_product in (("cpu", True), ("cuda", False), ("tpu", False)):
        ours.sharding = Mock(spec=NamedSharding)
        ours.sharding.mesh.devices = np.array([Mock(platform=platform)])
        assert ("conv_general_dilated" not in str(jax.make_jaxpr(lambda x: ours(x))(x))) == one_product


@pytest.mark.parametrize(("dtype", "far"), [("float32", 0.0), ("float32", 100.0), ("bfloat16", 0.0)])
def test_groups_are_normalised_whatever_is_added_up_first(dtype: str, far: float) -> None:
    ours = Layers(nnx.Rngs(0), dtype, groups=4).group_norm(24)
    rng = np.random.default_rng(0)
    ours.scale[...], ours.bias[...] = (jnp.asarray(rng.standard_normal(24), jnp.float32) for _ in range(2))
    x = jnp.asarray(rng.standard_normal((2, 5, 4, 24)) * np.linspace(1, 9, 24) + far, dtype)
    groups = np.asarray(x, np.float64).reshape(2, 20, 4, 6)
    expected = (groups - groups.mean((1, 3), keepdims=True)) / np.sqrt(groups.var((1, 3), keepdims=True) + 1e-5)
    expected = expected.reshape(x.shape) * np.asarray(ours.scale[...]) + np.asarray(ours.bias[...])
    found, gradient = with_gradient(ours, x)
    assert found.dtype == x.dtype
    rounding = float(jnp.finfo(dtype).eps) + 20 * EPS  # of the result; and of the sums, of x in each of which `far` is
    assert_close(found, expected, rounding + 4 * EPS * far)

    theirs = with_gradient(partial(nnx.GroupNorm.__call__, ours), x)[1]
    assert_close(*(np.asarray(y, np.float64) for y in (gradient, theirs)), 4 * rounding + 4 * EPS * far)
