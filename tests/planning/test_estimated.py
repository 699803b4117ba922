"""Programs traced for devices whose compilers are not here."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from hgdpo_jax.models import attend
from hgdpo_jax.planning import estimated
from hgdpo_jax.planning.arrays import needs
from hgdpo_jax.planning.chips import CHIPS


@pytest.mark.parametrize(("name", "quadratic"), [("rtx3090", False), ("h100", False), ("v5e", False), ("t4", True)])
def test_attention_is_that_of_the_device(name: str, quadratic: bool) -> None:
    """cuDNN's and splash hold no probabilities; a T4 has neither."""
    n, heads, width = 1024, 8, 64
    q = jax.ShapeDtypeStruct((2, n, heads, width), jnp.float16 if name == "t4" else jnp.bfloat16)

    def loss(q: jax.Array) -> jax.Array:
        return attend.attend(q, q, q).astype(jnp.float32).sum()

    with estimated.kernels_of(CHIPS[name]):
        traced = jax.jit(jax.grad(loss)).trace(q)
    largest = needs(traced.jaxpr.jaxpr).temporaries
    probabilities = 2 * heads * n * n * 2
    assert (largest > probabilities) == quadratic
    assert attend.kernel(SimpleNamespace(platform="cpu", device_kind="cpu"), q, q) is attend.xla  # as before
