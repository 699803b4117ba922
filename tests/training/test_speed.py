"""How fast a training is said to be, and what is traced of it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from hgdpo_jax.devices.peaks import mesh_peak
from hgdpo_jax.main import steps_to_trace
from hgdpo_jax.models import attend
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.training import speed
from hgdpo_jax.training.cost import operations
from hgdpo_jax.training.speed import Speed, remaining_steps
from hgdpo_jax.training.step import Numbers, TrainState

STATE = TrainState({}, None, (), jnp.zeros((), int))
NUMBERS = Numbers(np.zeros(2, np.uint32), *np.zeros(7, np.float32))


class Clock:
    """Seconds that only a test lets pass."""

    now = 1000.0

    def perf_counter(self) -> float:
        return self.now


class Step(jax.stages.Wrapped):
    """A step of 2 · 4³ operations for each row, that takes a second, and a hundred more where it is compiled."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._compiled = clock, set()

    def trace(self, state: Any, reference: Any, frozen: Any, batch: Any, numbers: Any) -> Any:
        rows = jnp.zeros((len(batch["winner"]), 4, 4))
        return SimpleNamespace(jaxpr=jax.make_jaxpr(lambda x: x @ x)(rows).jaxpr)

    def __call__(self, state: Any, reference: Any, frozen: Any, batch: Any, numbers: Any) -> tuple[Any, Any]:
        shape = batch["winner"].shape
        self._clock.now += 1.0 if shape in self._compiled else 101.0
        self._compiled.add(shape)
        return state, {}


def test_the_clock_counts_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(speed, "time", clock)
    found = Speed(Step(clock), 10, 5120.0)
    number = 0

    def run(*rows: int) -> None:
        nonlocal number
        for count in rows:
            number += 1
            found.step(number, STATE, {}, {}, {"winner": jnp.zeros((count, 1))}, NUMBERS)

    run(10)
    assert not any(name.startswith("speed/") for name in found.lap(100))  # it was compiled
    run(10, 20, 10, 10, 20)  # the first of 20 is compiled
    values = found.lap(72)
    assert values["speed/step_seconds"] == 1.0 and values["speed/pairs_per_second"] == 10.0
    assert values["speed/tflops_per_second"] == pytest.approx((3 * 1280 + 2560) / 4 / 1e12)
    assert values["speed/share_of_peak"] == pytest.approx((3 * 1280 + 2560) / 4 / 5120)
    assert values["speed/hours_left"] == pytest.approx(72 / 3600)
    clock.now += 50.0  # a checkpoint
    found.restart()
    run(10, 10)
    assert found.lap(70)["speed/step_seconds"] == 1.0


def devices(*kinds: str) -> Any:
    """A mesh of them."""
    return Mock(spec=Mesh, devices=np.array([SimpleNamespace(device_kind=kind) for kind in kinds]))


def test_a_peak_is_of_all_devices_and_of_those_that_are_known() -> None:
    assert mesh_peak(devices(*["NVIDIA H100 80GB HBM3"] * 8), "bfloat16") == 8 * 989e12
    assert mesh_peak(devices("NVIDIA A100-SXM4-40GB"), "tf32") == 156e12
    assert mesh_peak(devices("NVIDIA A100-SXM4-40GB"), "float32") == 19.5e12
    assert (
        mesh_peak(devices("TPU v5 lite"), "bfloat16") == 197e12 and mesh_peak(devices("TPU v5"), "bfloat16") == 459e12
    )
    assert mesh_peak(devices("cpu"), "float32") is None
    assert mesh_peak(devices("NVIDIA A100-SXM4-40GB MIG 1g.5gb"), "bfloat16") is None
    assert Speed(Step(Clock()), 1, None).lap(5).keys() <= {"memory/device_gib"}


@pytest.mark.parametrize("text", ["15:10", "10:10", "10", "a:b", ":10", "-1:5", "1:2:3", ""])
def test_what_is_no_range_of_steps_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=f"argument --profile {text}: expects FIRST:END with FIRST less than END"):
        steps_to_trace(text)


def test_of_the_steps_to_trace_those_to_go_are_taken() -> None:
    assert list(steps_to_trace("10:13")) == [10, 11, 12]
    assert list(remaining_steps(range(10, 15), 11, 13)) == [12, 13]
    assert not remaining_steps(range(0), 5, 10)
    with pytest.raises(UserError, match="argument --profile 10:15: the steps to go are 15 to 20"):
        remaining_steps(range(10, 15), 14, 20)


def test_a_trace_is_of_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(jax.profiler, "start_trace", seen.append)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: seen.append("stop"))
    found = Speed(Step(Clock()), 1, None, range(2, 4), tmp_path)
    for number in range(1, 6):
        seen.append(number)
        found.step(number, STATE, {}, {}, {"winner": jnp.zeros((1, 1))}, NUMBERS)
    assert seen == [1, 2, tmp_path, 3, "stop", 4, 5]
    with pytest.raises(UserError), Speed(Step(Clock()), 1, None, range(1, 9), tmp_path) as found:
        found.step(1, STATE, {}, {}, {"winner": jnp.zeros((1, 1))}, NUMBERS)
        raise UserError("a loss is not finite")
    assert seen[7:] == [tmp_path, "stop"]  # what was traced is there


def test_kernels_of_attention_count_as_the_products_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splash keeps its blocks whole; cuDNN cannot be looked into, and is not here: only its call is traced."""
    for name, found in (("check_cudnn_version", 91200), ("check_compute_capability", True)):
        monkeypatch.setattr(f"jax._src.cudnn.fused_attention_stablehlo.{name}", lambda *_, found=found: found)
    product = 2.0 * 2 * 8 * 256 * 384 * 40
    q, k = (jax.ShapeDtypeStruct((2, n, 8, 40), jnp.bfloat16) for n in (256, 384))
    for kernel in (attend.splash, attend.cudnn):
        gradient = jax.grad(lambda *x, kernel=kernel: kernel(*x).astype(jnp.float32).sum(), (0, 1, 2))
        assert operations(jax.make_jaxpr(kernel)(q, k, k).jaxpr) == 2 * product
        found = operations(jax.make_jaxpr(gradient)(q, k, k).jaxpr)
        assert found == pytest.approx(7 * product, rel=1e-3)  # and a sum for each query
