"""What a program reads, writes and keeps: against bytes that can be counted by hand."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

from hgdpo_jax.planning.arrays import Needs, needs

ROWS, WIDTH = 1024, 64
ACTIVATION, WEIGHT = 4 * ROWS * WIDTH, 4 * WIDTH * WIDTH
X, W = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32), jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)


def found(function: Callable, *arguments: jax.ShapeDtypeStruct, trips: int = 1) -> Needs:
    return needs(jax.jit(function).trace(*arguments).jaxpr.jaxpr, trips)


def network(x: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
    return (jax.nn.silu(jax.nn.silu(x @ w) @ v) ** 2).mean()


def test_a_gradient_keeps_what_products_give_and_read() -> None:
    # Forwards: x w, its silu, and that times v are written, each from one other. Backwards: the gradient of that
    # product is computed from the product alone; two products read it, one beside the silu; the gradient of x w is
    # computed from x w and from what comes back; the last product reads it beside x.
    forwards, backwards = 3 + 3, 2 + (2 + 2) + 3 + 2
    traffic = (forwards + backwards) * ACTIVATION + 5 * WEIGHT
    # At most: both products and the silu between them; a gradient takes the place of what it is computed from.
    assert found(jax.grad(network, (1, 2)), X, W, W) == (3 * ACTIVATION, traffic)


def test_what_follows_a_product_is_joined_with_it() -> None:
    def layer(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.tanh(2 * (x @ w) + 1)

    assert found(layer, X, W) == (0, 2 * ACTIVATION + WEIGHT)
    both = found(lambda x, w: (layer(x, w) @ w, layer(x, w) @ (w + 1)), X, W)
    assert both == (ACTIVATION + WEIGHT, (2 + 2 + 2) * ACTIVATION + (1 + 1 + 2 + 1) * WEIGHT)


def test_a_chip_that_holds_all_arrays_reads_arguments_and_writes_results() -> None:
    gradient = jax.jit(jax.grad(network, (1, 2))).trace(X, W, W).jaxpr.jaxpr
    assert needs(gradient, on_chip=6 * ACTIVATION) == (3 * ACTIVATION, ACTIVATION + 4 * WEIGHT)
    least, most = needs(gradient, on_chip=6 * ACTIVATION).traffic, needs(gradient).traffic
    assert least < needs(gradient, on_chip=2 * ACTIVATION).traffic < most


def test_what_no_result_depends_on_is_left_out_and_the_same_counts_once() -> None:
    def twice(x: jax.Array, w: jax.Array) -> jax.Array:
        _ = x @ (w + 1)
        return (x @ w) @ w + (x @ w) @ w

    assert found(twice, X, W) == found(lambda x, w: 2 * ((x @ w) @ w), X, W)


def test_checkpoints_compute_again() -> None:
    layers = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)

    def deep(active: bool) -> Callable:
        def block(x: jax.Array, w: jax.Array) -> jax.Array:
            return x + jax.nn.silu(jax.nn.silu(x @ w) @ w) @ w

        kept = jax.checkpoint(block) if active else block

        def loss(w: jax.Array, x: jax.Array) -> jax.Array:
            for _ in range(8):
                x = kept(x, w)
            return (x**2).mean()

        return jax.grad(loss)

    without, with_them = found(deep(False), layers, X), found(deep(True), layers, X)
    assert with_them.temporaries < 0.6 * without.temporaries and with_them.traffic > 1.2 * without.traffic


def test_a_sum_that_is_read_twice_is_kept_where_its_terms_are_larger() -> None:
    """As the residual stream of a network is: else every block would be kept until the last."""

    def stream(x: jax.Array, w: jax.Array) -> jax.Array:
        for _ in range(16):
            x = x + jnp.tanh(x.sum()) * (x @ w)
        return x

    assert found(stream, X, W).temporaries <= 3 * ACTIVATION


def test_loops_read_and_write_in_each_turn() -> None:
    def scanned(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (x @ w @ w, None), x, None, 6)[0]

    def counted(x: jax.Array, w: jax.Array, turns: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, turns, lambda _, x: x @ w @ w, x)

    turn = 2 * (2 * ACTIVATION + WEIGHT)
    assert found(scanned, X, W) == (ACTIVATION, 6 * turn)
    turns = jax.ShapeDtypeStruct((), jnp.int32)
    assert found(counted, X, W, turns, trips=9).traffic == pytest.approx(9 * turn, rel=1e-4)


def test_a_piece_reads_as_much_as_it_gives() -> None:
    table = jax.ShapeDtypeStruct((50_000, WIDTH), jnp.float32)
    rows = jax.ShapeDtypeStruct((10,), jnp.int32)
    assert found(lambda table, rows: table[rows] * 2, table, rows).traffic < 4 * 4 * 10 * WIDTH
