"""Kernels in 8 bits: how far they are from the whole ones, and that all else is the same."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hgdpo_jax.devices.sharding import tree_shardings
from hgdpo_jax.devices.transfer import place
from hgdpo_jax.models.int8 import Kernel, dequantised, quantise
from hgdpo_jax.models.layers import Layers
from hgdpo_jax.models.lora import LoRALinear, add_lora
from hgdpo_jax.models.unet import UNet2DConditionModel
from tests import tiny
from tests.rounding import EPS, GRADIENT, NETWORK, assert_close

RNG = np.random.default_rng(0)
X, CONTEXT = RNG.standard_normal((2, 4, 4, 8), np.float32), RNG.standard_normal((2, 5, 8), np.float32)
T = np.array([1, 700], np.int32)


def whole(model: nnx.Module) -> None:
    """Multiplies every kernel out, in place."""
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, Kernel) and layer.kernel_scale is not None:
            layer.kernel = nnx.Param(dequantised(layer.kernel[...], layer.kernel_scale[...]))
            layer.kernel_scale = None


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_an_output_is_wrong_by_half_a_step_of_each_weight_at_most(kind: str) -> None:
    make = Layers(nnx.Rngs(0), jnp.float32)
    layer = make.linear(8, 5) if kind == "linear" else make.conv(8, 5, 3)
    before, kernel = layer(jnp.asarray(X)), layer.kernel[...]
    quantise([layer])
    codes, scale = layer.kernel[...], layer.kernel_scale[...]
    assert codes.dtype == jnp.int8 and np.abs(codes).max() == 127
    assert (np.abs(dequantised(codes, scale) - kernel) <= (0.5 + 127 * EPS) * scale).all()
    size = make.linear(8, 1) if kind == "linear" else make.conv(8, 1, 3)
    size.kernel = nnx.Param(jnp.ones_like(kernel[..., :1]))
    sums = np.asarray(size(jnp.abs(X)))  # of what each output's weights multiply
    apart = np.abs(layer(jnp.asarray(X)) - before)
    assert (apart <= 0.5 * sums * scale + 10 * EPS * np.abs(before).max()).all() and apart.max() > 0


def test_a_network_with_lora_is_that_of_the_rounded_weights_and_so_is_its_gradient() -> None:
    model = tiny.random_model(UNet2DConditionModel, tiny.ONE_LEVEL, 0)
    add_lora(model, 2, 2.0, nnx.Rngs(0), ("attention", "convolutions"))
    graph, lora, frozen = nnx.split(model, nnx.LoRAParam, ...)
    lora = jax.tree.map(lambda x: x + 0.1, lora)

    def squares(lora: Any, graph: Any, frozen: Any) -> tuple[jax.Array, jax.Array]:
        found = nnx.merge(graph, lora, frozen)(*map(jnp.asarray, (X, T, CONTEXT)))
        return (found**2).mean(), found

    both = jax.jit(jax.value_and_grad(squares, has_aux=True), static_argnums=1)
    (_, unrounded), unrounded_gradient = both(lora, graph, frozen)
    kernels = sum(m.kernel[...].nbytes for _, m in nnx.iter_modules(model) if isinstance(m, Kernel))
    others = sum(x.nbytes for x in jax.tree.leaves(frozen)) - kernels
    quantise([model])
    graph8, _, frozen8 = nnx.split(model, nnx.LoRAParam, ...)
    scales = 4 * sum(m.out_features for _, m in nnx.iter_modules(model) if isinstance(m, Kernel))
    assert sum(x.nbytes for x in jax.tree.leaves(frozen8)) == kernels // 4 + scales + others
    (_, found), gradient = both(lora, graph8, frozen8)
    backward = jax.eval_shape(lambda lora: jax.vjp(lambda lora: squares(lora, graph8, frozen8)[1], lora)[1], lora)
    assert {x.dtype for x in jax.tree.leaves(backward)} >= {jnp.dtype("int8")}  # kept for it, and not what they make
    before = [x for x in jax.tree.leaves(frozen) if x.ndim > 1]
    whole(model)
    rounded = [x for x in jax.tree.leaves(nnx.split(model, nnx.LoRAParam, ...)[2]) if x.ndim > 1]
    # The layers' errors are independent: they add up as squares.
    error = sum(float(jnp.sum((a - b) ** 2) / jnp.sum(b**2)) for a, b in zip(rounded, before, strict=True)) ** 0.5
    (_, expected), expected_gradient = both(lora, graph, nnx.split(model, nnx.LoRAParam, ...)[2])
    assert_close(found, expected, NETWORK)
    gradients = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(g)])
                 for g in (gradient, expected_gradient, unrounded_gradient)]  # fmt: skip
    assert_close(gradients[0], gradients[1], GRADIENT)
    for a, b, ways in ((found, unrounded, 1), (gradients[0], gradients[2], 2)):
        assert 1e-3 < np.linalg.norm(a - b) / np.linalg.norm(b) < 3 * ways * error < 0.3  # three deviations


def test_codes_lie_where_the_kernel_lay() -> None:
    mesh, layer = tiny.mesh(1, 8, 1), LoRALinear(Layers(nnx.Rngs(0), jnp.float32).linear(16, 8), 2, 2.0, nnx.Rngs(1))
    holder = nnx.Dict(to_q=layer)
    state = nnx.state(holder)
    nnx.update(holder, place(state, tree_shardings(state, mesh)))
    before = layer.kernel[...].sharding
    quantise([holder])
    assert layer.kernel[...].sharding == before and not before.is_fully_replicated
    assert jax.jit(lambda x: holder["to_q"](x))(jnp.ones((8, 16))).shape == (8, 8)
