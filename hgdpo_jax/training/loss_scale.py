"""A dynamic loss scale (Micikevicius et al. 2018): no gradient is too small for float16, and one overflow costs a step.

The loss is multiplied by the scale while it is differentiated, a power of two, which rounds nothing. It is the same for
every `model.dtype`, so that a training can go on in another one; only float16 overflows because of it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

FIRST, LARGEST = 2.0**12, 2.0**16
DOUBLED_AFTER = 2000  # steps without an overflow
LOSS_SCALE, SKIPPED = "loss_scale", "skipped_steps"  # names in the state and in the log


class LossScale(NamedTuple):
    """The state.

    Attributes:
        inner: of the optimizer.
        loss_scale: of the next step.
        steps: since it changed.
        skipped_steps: all so far.
    """

    inner: Any
    loss_scale: Float[Array, ""]
    steps: Int[Array, ""]
    skipped_steps: Int[Array, ""]


def with_loss_scale(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """An optimizer whose `update` takes the gradient of the loss times the scale, and `least_scale`.

    Where the gradient's norm is not finite while the scale is above `least_scale`, the step changes nothing but the
    scale, which is halved. After :data:`DOUBLED_AFTER` other steps it is doubled.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> LossScale:
        return LossScale(inner.init(params), jnp.float32(FIRST), jnp.int32(0), jnp.int32(0))

    def update(
        gradient: PyTree, state: LossScale, params: PyTree = None, *, least_scale: Any, **_: Any
    ) -> tuple[PyTree, LossScale]:
        gradient = jax.tree.map(lambda x: x / state.loss_scale, gradient)
        skip = ~jnp.isfinite(optax.tree.norm(gradient)) & (state.loss_scale > least_scale)
        updates, new = inner.update(gradient, state.inner, params)
        updates = jax.tree.map(lambda x: jnp.where(skip, 0.0, x), updates)
        new = jax.tree.map(lambda old, x: jnp.where(skip, old, x), state.inner, new)
        double = ~skip & (state.steps + 1 >= DOUBLED_AFTER) & (state.loss_scale < LARGEST)
        scale = jnp.where(skip, 0.5, jnp.where(double, 2.0, 1.0)) * state.loss_scale
        steps = jnp.where(skip | double, 0, state.steps + 1)
        return updates, LossScale(new, scale, steps, state.skipped_steps + skip)

    return optax.GradientTransformationExtraArgs(init, update)
