"""AdamW in 8 bits beside optax's, and Prodigy beside its paper."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hgdpo_jax.devices.sharding import tree_shardings
from hgdpo_jax.devices.transfer import place
from hgdpo_jax.training import adam8bit
from hgdpo_jax.training.adam8bit import OCTAVES, decoded, encoded
from hgdpo_jax.training.checkpoints import Checkpoints, tree_hash
from hgdpo_jax.training.optimizer import first_step, make_optimizer
from tests import tiny
from tests.rounding import EPS, assert_close

STEP = 2 ** (OCTAVES / 255) - 1  # from a code of the second moment to the next
SHAPE = (64, 640)
SPREAD = np.exp(1.5 * np.random.default_rng(0).standard_normal(SHAPE))  # gradients of one block are far apart


def gradients(count: int) -> list[dict]:
    """That of a kernel, of which some numbers go one way, and of a bias."""
    rng = np.random.default_rng(1)
    return [
        {"kernel": jnp.asarray(SPREAD * (rng.standard_normal(SHAPE) + 0.3), jnp.float32), "bias": jnp.ones(SHAPE[1])}
        for _ in range(count)
    ]


def updated(tx: Any, given: list[dict], state: Any = None) -> tuple[list[dict], Any]:
    """The updates by some gradients, and the state after them."""
    params, update, found = jax.tree.map(jnp.zeros_like, given[0]), jax.jit(tx.update), []
    state = tx.init(params) if state is None else state
    for gradient in given:
        updates, state = update(gradient, state, params)
        found.append(updates)
    return found, state


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_a_number_is_less_than_a_code_away_and_right_on_average(dtype: str) -> None:
    keys = jax.random.split(jax.random.key(0))
    x = jnp.asarray(SPREAD, jnp.float32) * (
        jax.random.rademacher(keys[0], SHAPE, jnp.float32) if dtype == "int8" else 1
    )
    x = x.at[0, :320].set(0.0)
    codes, largest = encoded(x, jax.random.uniform(keys[1], SHAPE), jnp.dtype(dtype))
    assert (codes.dtype, largest.shape) == (dtype, (64, 4))  # 640 is four times 160
    found, blocks = decoded(codes, largest), np.asarray(largest).repeat(160, 1)
    assert_close(np.abs(found).reshape(64, 4, 160).max(-1), largest, EPS)
    error = (np.asarray(found, np.float64) - x)[x != 0]
    x, blocks = np.abs(x)[x != 0], blocks[np.asarray(x) != 0]
    # (y + 1)² − y² ≤ 2 (y + 1) of the codes y.
    width = 2 * (np.sqrt(x / blocks) + 1 / 127) / 127 * blocks if dtype == "int8" else STEP * x
    assert (np.abs(error) <= width * (1 + 1e-3)).all()
    assert abs((error / width).mean()) < 4 * 0.5 / np.sqrt(x.size)  # four deviations


def test_adamw_in_8_bits_stays_near_adamw_with_a_quarter_of_its_state(base: Path) -> None:
    given, settings = gradients(100), tiny.config(base, params="all", optimizer="adamw8bit", clip_norm=0.0).train
    short, long = (updated(optax.scale_by_adam(), given[:n])[1] for n in (10, 100))
    mine, mine_long = (updated(adam8bit.scale_by_adam_8bit(0.9, 0.999), given[:n])[1] for n in (10, 100))
    # A second moment is at most a code wrong after each step, and what comes later is added to that.
    v = np.asarray(decoded(mine.nu["kernel"], mine.nu_largest["kernel"]), np.float64) / short.nu["kernel"]
    kept = short.nu["kernel"] > 16 * 2.0**-OCTAVES * np.asarray(mine.nu_largest["kernel"]).repeat(160, 1)
    assert (v < (1 + STEP) ** 10)[kept].all() and (v > (1 + STEP) ** -10).all() and kept.mean() > 0.9
    # A first moment is at most the largest code's width wrong after each step, and a tenth of that is forgotten.
    blocks = np.max([np.abs(SPREAD * 4)], 0).reshape(64, 4, 160).max(-1).repeat(160, 1)
    for own, theirs in ((mine, short), (mine_long, long)):
        m = np.asarray(decoded(own.mu["kernel"], own.mu_largest["kernel"]))
        assert (np.abs(m - theirs.mu["kernel"]) < 10 * 2 / 127 * blocks).all()
    first, tx = optax.adamw(1.0, weight_decay=0.0), make_optimizer(settings)
    tx_update = optax.GradientTransformation(tx.init, lambda g, s, p: tx.update(g, s, p, least_scale=np.inf))
    scaled = [jax.tree.map(lambda x: 2.0**12 * x, gradient) for gradient in given]
    (theirs, state), (own, own_state) = updated(first, given), updated(tx_update, scaled)
    for name in given[0]:
        assert_close(own[0][name], theirs[0][name], 10 * EPS)  # nothing was rounded before
        walked, apart = (
            sum(x)
            for x in (
                np.array([u[name] for u in theirs]),
                np.array([a[name] - b[name] for a, b in zip(own, theirs, strict=True)]),
            )
        )
        # A bias keeps float32. Else the root of the second moment is wrong by a tenth, now up and now down.
        assert np.linalg.norm(apart) < (0.1 if name == "kernel" else 10 * EPS) * np.linalg.norm(walked)
    sizes = [sum(x.nbytes for x in jax.tree.leaves(tree)) for tree in (state, own_state)]
    numbers, small = np.prod(SHAPE), SHAPE[1]
    assert sizes[0] - 8 * (numbers + small) < 32 > sizes[1] - (2 + 8 / 160) * numbers - 8 * small
    assert sizes[1] < 0.3 * sizes[0]


def test_codes_lie_where_their_parameters_do_and_a_restored_state_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    mesh, rng = tiny.mesh(1, 8, 1), np.random.default_rng(2)
    given = [{"to_q": {"kernel": jnp.asarray(rng.standard_normal((64, 256)), jnp.float32)}} for _ in range(4)]
    tx = adam8bit.adamw_8bit(0.9, 0.999, 0.0)
    everywhere = [place(gradient, tree_shardings(gradient, mesh)) for gradient in given]
    init = jax.eval_shape(tx.init, given[0])
    placed = tree_shardings(init, mesh)
    start = jax.jit(tx.init, out_shardings=placed)(everywhere[0])
    for x in jax.tree.leaves(start):
        assert x.ndim < 2 or {shard.data.nbytes * 8 for shard in x.addressable_shards} == {x.nbytes}
    update = jax.jit(tx.update, out_shardings=(tree_shardings(given[0], mesh), placed))
    states = [start]
    for gradient in everywhere:
        found, state = update(gradient, states[-1], gradient)
        states.append(state)
    alone, _ = updated(tx, given)
    assert_close(found["to_q"]["kernel"], alone[-1]["to_q"]["kernel"], STEP)  # where rounding turned one code
    assert np.mean(np.abs(found["to_q"]["kernel"] - alone[-1]["to_q"]["kernel"]) > 10 * EPS) < 1e-3
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, {"optimizer": states[2]}, {"position": 2})
    kept = Checkpoints(tmp_path).restore(2, {"optimizer": place(init, placed)})["optimizer"]
    for gradient in everywhere[2:]:
        again, kept = update(gradient, kept, gradient)
    assert tree_hash((again, kept)) == tree_hash((found, states[-1]))


def prodigy(given: list[np.ndarray], x: np.ndarray, b1: float, b2: float) -> tuple[np.ndarray, float]:
    """Algorithm 4 of Mishchenko & Defazio 2023 with Adam's correction, float64: parameters and estimate at the end."""
    d = d0 = 1e-6
    start, m, v, r, s = x, np.zeros_like(x), np.zeros_like(x), 0.0, np.zeros_like(x)
    for k, g in enumerate(given, 1):
        rate = d * np.sqrt(1 - b2**k) / (1 - b1**k)
        m, v = b1 * m + (1 - b1) * d * g, b2 * v + (1 - b2) * (d * g) ** 2
        r = np.sqrt(b2) * r + rate * d / d0 * g @ (start - x)
        s = np.sqrt(b2) * s + rate * d / d0 * g
        d = max(d, r / np.abs(s).sum())
        x = x - rate * m / (np.sqrt(v) + d * 1e-8)
    return x, d


def test_prodigy_is_the_papers_and_its_estimate_is_logged(base: Path) -> None:
    """On the gradient of |x − 1|, in two arrays which the optimizer sees as one vector."""
    config = tiny.config(base, optimizer="prodigy", lr=1.0, warmup=0, clip_norm=0.0, adam=(0.9, 0.99))
    tx, params = make_optimizer(config.train), {"a": jnp.zeros(3), "b": jnp.zeros(5)}
    state, update, given = tx.init(params), jax.jit(tx.update), []
    for _ in range(40):
        gradient = jax.tree.map(lambda x: jnp.sign(x - 1.0), params)
        given.append(np.concatenate([gradient["a"], gradient["b"]]).astype(np.float64))
        scaled = jax.tree.map(lambda x: 2.0**12 * x, gradient)
        updates, state = update(scaled, state, params, least_scale=np.inf)
        params = optax.apply_updates(params, updates)
    expected, estimate = prodigy(given, np.zeros(8), 0.9, 0.99)
    assert estimate > 1e4 * first_step(config.train) == 1e4 * 1e-6
    assert float(optax.tree.get(state, "estim_lr")) == pytest.approx(estimate, rel=1e-4)
    np.testing.assert_allclose(np.concatenate([params["a"], params["b"]]), expected, rtol=0, atol=1e-4)
