"""Attention in chunks of queries is attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hgdpo_jax.models import attention
from tests.rounding import EPS, assert_close


@pytest.mark.parametrize(("queries", "loops"), [(12, 6), (7, 7)])
def test_chunks_of_queries_change_neither_values_nor_gradients(
    monkeypatch: pytest.MonkeyPatch, queries: int, loops: int
) -> None:
    rng = np.random.default_rng(0)
    shapes = (2, queries, 3, 4), (2, 10, 3, 4), (2, 10, 3, 4)
    q, k, v = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)

    def run(*arrays: jax.Array) -> tuple[jax.Array, tuple]:
        return jax.jit(jax.value_and_grad(lambda q, k, v: jnp.sin(attention.attend(q, k, v)).sum(), (0, 1, 2)))(*arrays)

    whole = run(q, k, v)
    logits = jnp.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(4)
    expected = jnp.sin(jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(logits), v)).sum()
    assert_close(whole[0], expected, 20 * EPS, size=q.size)  # a sum of so many values of at most 1
    # two queries at a time: 2 examples x 3 heads x 2 queries x 10 keys on one device
    monkeypatch.setattr(attention, "_PROBABILITIES", 120 / jax.device_count())
    assert f"length={loops}" in str(jax.make_jaxpr(attention.attend)(q, k, v))
    for a, b in zip(jax.tree.leaves(run(q, k, v)), jax.tree.leaves(whole), strict=True):
        assert_close(a, b, 20 * EPS, size=q.size if a.ndim == 0 else None)
