"""Every kernel of attention is attention; which one is chosen; and each device computes its own part."""

import re
from functools import partial
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from hgdpo_jax.devices.sharding import heads_sharding
from hgdpo_jax.models import attend
from hgdpo_jax.models.attention import Attention
from hgdpo_jax.models.layers import Layers
from tests import tiny
from tests.rounding import EPS, assert_close


def device(platform: str, kind: str, capability: str = "") -> Mock:
    """A described device."""
    return Mock(spec=jax.Device, platform=platform, device_kind=kind, compute_capability=capability)


TPU = device("tpu", "TPU v5 lite")
NVIDIA = device("gpu", "NVIDIA H100 80GB HBM3", "9.0")
TURING = device("gpu", "NVIDIA GeForce RTX 2080 Ti", "7.5")
AMD = device("gpu", "AMD Instinct MI300X")
CPU = device("cpu", "cpu")


def numbers(b: int, n: int, m: int, heads: int, width: int) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    shapes = (b, n, heads, width), (b, m, heads, width), (b, m, heads, width)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def with_gradients(function, arrays):
    return jax.jit(jax.value_and_grad(lambda *x: jnp.sin(function(*x)).sum(), (0, 1, 2)))(*arrays)


def formula(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    logits = jnp.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(q.shape[-1])
    return jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(logits), v)


@pytest.mark.parametrize(("n", "m"), [(256, 384), (200, 77), (100, 1000)])
def test_splash_is_attention(n: int, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attend, "_ON_CHIP", 0)  # no more than a block: 1000 keys are two
    arrays = numbers(2, n, m, 2, 40)
    found, wanted = (with_gradients(f, arrays) for f in (partial(attend.splash, interpret=True), formula))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert_close(a, b, 40 * EPS, size=arrays[0].size if a.ndim == 0 else None)  # sums of m terms, twice


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("precision", ["tensorfloat32", "float32", "default"])
def test_splash_can_be_compiled_for_a_tpu_whatever_precision_is_asked_for(dtype: str, precision: str) -> None:
    arrays = [x.astype(dtype) for x in numbers(1, 128, 128, 1, 8)]
    gradient = jax.grad(lambda *x: attend.splash(*x).astype(jnp.float32).sum(), (0, 1, 2))
    with jax.default_matmul_precision(precision):
        text = jax.jit(gradient).trace(*arrays).lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" in text


def test_keys_and_values_are_transposed_once_before_a_loop() -> None:
    layer = Attention(8, 8, 2, Layers(nnx.Rngs(0), jnp.float32))

    def steps(x: jax.Array, text: jax.Array) -> jax.Array:
        pairs = [layer.keys_values(text)]
        return jax.lax.fori_loop(0, 3, lambda _, x: layer(x, pairs), x)

    program = jax.jit(steps).lower(jnp.ones((2, 6, 8)), jnp.ones((2, 5, 8))).compile().as_text()
    (carried,) = re.findall(r"= \((.*)\) while\(", program)
    assert set(re.findall(r"f32\[(\d+,\d+,\d+,\d+)\]", carried)) == {"2,2,4,5", "2,2,5,4"}  # heads before tokens


@pytest.mark.parametrize(("queries", "loops"), [(12, 6), (7, 7)])
def test_chunks_of_queries_are_attention(monkeypatch: pytest.MonkeyPatch, queries: int, loops: int) -> None:
    arrays = numbers(2, queries, 10, 3, 4)
    monkeypatch.setattr(attend, "_FEW_KEYS", 0)
    monkeypatch.setattr(attend, "_PROBABILITIES", 2 * 3 * 2 * 10)  # of two queries
    assert f"length={loops}" in str(jax.make_jaxpr(attend.attend)(*arrays))
    found, wanted = (with_gradients(f, arrays) for f in (attend.attend, formula))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert_close(a, b, 20 * EPS, size=arrays[0].size if a.ndim == 0 else None)


def test_what_is_computed_again_is_not_held() -> None:
    """Between the passes only queries, keys and values are kept; the function and its gradient are attention's."""
    arrays = numbers(2, 12, 5, 3, 4)
    kept = {name: jax.tree.leaves(jax.eval_shape(partial(jax.vjp, f), *arrays)[1]) for name, f in
            (("again", attend.recomputed), ("xla", attend.xla))}  # fmt: skip
    held = {name: [x.shape for x in found if set(x.shape) >= {12, 5}] for name, found in kept.items()}
    assert held["xla"] and not held["again"]
    found, wanted = (with_gradients(f, arrays) for f in (attend.recomputed, formula))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert_close(a, b, 20 * EPS, size=arrays[0].size if a.ndim == 0 else None)


@pytest.mark.parametrize("size", [1.0, 30.0])
def test_to_divide_last_is_attention(size: float) -> None:
    """Also where the exponential of a logit is no float32: some are above 1,000, and round by EPS of that."""
    q, k, v = numbers(2, 12, 5, 3, 4)
    found, wanted = (with_gradients(f, (size * q, size * k, v)) for f in (attend.divided_last, formula))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert_close(a, b, 20 * EPS, size=size**2 * (q.size if a.ndim == 0 else 1))


def test_devices_compute_their_own_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """With few enough probabilities for a device's part, but not for all, nothing is cut; a third of that, and
    each device cuts its own part. Three heads are not split over two devices."""
    monkeypatch.setattr(attend, "_FEW_KEYS", 0)
    mesh = tiny.mesh(2, 2, 2)
    for heads in (4, 3):
        arrays = numbers(4, 6, 10, heads, 4)
        sharding = heads_sharding(mesh)
        kept = sharding if heads == 4 else NamedSharding(mesh, PartitionSpec(("fsdp", "data")))
        placed = [jax.device_put(x, kept) for x in arrays]
        wanted = with_gradients(formula, arrays)
        on_one_device = 4 * heads * 6 * 10 // (8 if heads == 4 else 4)
        for allowed, loops in ((on_one_device, ""), (on_one_device // 3, "length=3")):
            monkeypatch.setattr(attend, "_PROBABILITIES", allowed)
            run = partial(attend.attend, sharding=sharding)  # a new one, which is traced anew
            assert ("length=" in str(jax.make_jaxpr(run)(*placed))) == bool(loops)
            assert loops in str(jax.make_jaxpr(run)(*placed))
            found = with_gradients(run, placed)
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
                assert_close(a, b, 20 * EPS, size=arrays[0].size if a.ndim == 0 else None)


@pytest.mark.parametrize(
    ("described", "n", "m", "width", "dtype", "wanted"),
    [
        (TPU, 4096, 4096, 40, "bfloat16", attend.splash),
        (TPU, 1024, 1024, 80, "float32", attend.splash),
        (TPU, 256, 256, 160, "bfloat16", attend.xla),
        (TPU, 4096, 4096, 40, "float16", attend.in_chunks),
        (TPU, 4096, 77, 40, "bfloat16", attend.recomputed),
        (TPU, 1024, 77, 80, "bfloat16", attend.xla),
        (TPU, 16384, 16384, 512, "float32", attend.splash),  # of a VAE
        (NVIDIA, 4096, 4096, 40, "bfloat16", attend.cudnn),
        (NVIDIA, 4096, 77, 40, "float16", attend.cudnn),
        (NVIDIA, 704, 77, 64, "bfloat16", attend.cudnn),  # of SDXL at 1024×704
        (NVIDIA, 1024, 1024, 160, "bfloat16", attend.xla),
        (NVIDIA, 256, 256, 64, "bfloat16", attend.xla),
        (NVIDIA, 4096, 4096, 40, "float32", attend.in_chunks),
        (TURING, 4096, 4096, 40, "float16", attend.in_chunks),
        (AMD, 4096, 4096, 40, "bfloat16", attend.in_chunks),
        (CPU, 4096, 4096, 40, "bfloat16", attend.in_chunks),
        (CPU, 4096, 4096, 40, "float32", attend.in_chunks),
        (CPU, 1024, 1024, 40, "float32", attend.divided_last),
        (CPU, 1024, 1024, 40, "bfloat16", attend.xla),
    ],
)
def test_the_table(described, n: int, m: int, width: int, dtype: str, wanted) -> None:
    q, k = (jax.ShapeDtypeStruct((64, tokens, 8, width), jnp.dtype(dtype)) for tokens in (n, m))
    assert attend.kernel(described, q, k) is wanted  # more probabilities than 2²⁶ in each, but of few keys


def test_float16_is_computed_in_float32_on_a_processor_alone() -> None:
    x = jax.ShapeDtypeStruct((1, 4, 2, 8), jnp.float16)
    traced = jax.jit(attend.xla).trace(x, x, x)
    texts = {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "cuda", "tpu")}
    wide = [name for name, text in texts.items() if "tensor<1x4x2x8xf32>" in text]
    assert wide == ["cpu"] and all("tensor<1x4x2x8xf16>" in text for text in texts.values())
