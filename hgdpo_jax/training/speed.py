"""How fast a training is: its steps timed without what is not training, and what its devices could do at most."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from hgdpo_jax import processes
from hgdpo_jax.errors import UserError
from hgdpo_jax.training.cost import operations
from hgdpo_jax.training.step import Batch, Metrics, Numbers, Params, TrainState


class Peak(NamedTuple):
    """Operations a second of one device in dense products, in 1e12: of bfloat16 and float16; of float32 as JAX
    multiplies it unless told otherwise (TF32 on a GPU, one pass in bfloat16 on a TPU); of float32 in full."""

    half: float
    float32: float
    float32_in_full: float | None


# What JAX calls a device → its peak, without sparsity, as its maker says: for a TPU, cloud.google.com/tpu/docs/v4, v5e,
# v5p and v6e (a chip is one device); for a GPU, the data sheets of A100, H100 and H200 and the page of HGX (B200: an
# eighth of a board). A part of a GPU (MIG) is none of them.
PEAKS: tuple[tuple[str, Peak], ...] = (
    (r"TPU v4", Peak(275.0, 275.0, None)),
    (r"TPU v5e|TPU v5 lite", Peak(197.0, 197.0, None)),
    (r"TPU v5p?", Peak(459.0, 459.0, None)),
    (r"TPU v6e|TPU v6 lite", Peak(918.0, 918.0, None)),
    (r"NVIDIA A100(-SXM4-\d\dGB|-PCIE-40GB| 80GB PCIe)", Peak(312.0, 156.0, 19.5)),
    (r"NVIDIA H100 80GB HBM3|NVIDIA H200", Peak(989.0, 494.5, 67.0)),
    (r"NVIDIA H100 NVL|NVIDIA H200 NVL", Peak(835.5, 417.5, 60.0)),
    (r"NVIDIA H100 PCIe", Peak(756.0, 378.0, 51.0)),
    (r"NVIDIA B200", Peak(2250.0, 1125.0, 75.0)),
)


def peak(mesh: Mesh, dtype: str) -> float | None:
    """Operations a second that all devices of a mesh do at most, together; None where that is not known.

    Args:
        mesh: of any devices.
        dtype: float32, bfloat16 or float16: what the model computes in.
    """
    plain = jax.config.jax_default_matmul_precision in (None, "default")
    total = 0.0
    for device in mesh.devices.flat:
        found = next((peak for pattern, peak in PEAKS if re.fullmatch(pattern, device.device_kind)), None)
        if found is None:
            return None
        value = found.half if dtype != "float32" else found.float32 if plain else found.float32_in_full
        if value is None:
            return None
        total += 1e12 * value
    return total


def steps_to_trace(text: str) -> range:
    """The steps 10 to 14 of `10:15`.

    Raises:
        UserError: it is no such range.
    """
    numbers = re.fullmatch(r"(\d+):(\d+)", text)
    steps = range(*map(int, numbers.groups())) if numbers else range(0)
    if not steps:
        raise UserError(f"argument --profile {text}: expects FIRST:END with FIRST less than END, such as 10:15")
    return steps


def those_left(traced: range, done: int, steps: int) -> range:
    """Of the steps that are to be traced, those between `done` and the last.

    Raises:
        UserError: there is none.
    """
    left = range(max(traced.start, done + 1), min(traced.stop, steps + 1))
    if traced and not left:
        raise UserError(f"argument --profile {traced.start}:{traced.stop}: the steps to go are {done + 1} to {steps}")
    return left


class Speed:
    """Runs the steps of a stage on a clock that stands still while one is compiled, and during all that ends with
    :meth:`restart`.

    Args:
        step: the jitted step, see :func:`hgdpo_jax.training.step.make_step`.
        batch: examples of a step.
        peak: operations a second that all devices do together at most, or None.
        traced: steps whose JAX trace is written, by process 0.
        folder: for the trace.
    """

    def __init__(
        self,
        step: Callable[..., tuple[TrainState, Metrics]],
        batch: int,
        peak: float | None,
        traced: range = range(0),
        folder: Path = Path(),
    ) -> None:
        self._step, self._batch, self._peak, self._folder = step, batch, peak, folder
        self._traced = traced if processes.first_process() else range(0)
        self._operations: dict[Any, float] = {}  # shape of a batch → of its step
        self._running: Any = None
        self.restart()

    def restart(self) -> None:
        """Forgets the steps since the last :meth:`lap`: from now on, it is steps that take the time."""
        self._begin, self._steps, self._done = time.perf_counter(), 0, 0.0

    def step(
        self, number: int, state: TrainState, reference: Params, frozen: Params, batch: Batch, numbers: Numbers
    ) -> tuple[TrainState, Metrics]:
        """The step `number`, which is given to the devices and not waited for, unless it is to be compiled or is the
        last that is traced."""
        if self._traced and number == self._traced.start:
            jax.profiler.start_trace(self._folder)
        arguments, shape = (state, reference, frozen, batch, numbers), batch["winner"].shape
        new = shape not in self._operations
        if new:
            jax.block_until_ready(self._running)
            begin = time.perf_counter()
            # The call below finds this trace in JAX's cache.
            self._operations[shape] = operations(self._step.trace(*arguments).jaxpr)
        state, metrics = self._step(*arguments)
        self._running = metrics
        if new:
            jax.block_until_ready(metrics)
            self._begin += time.perf_counter() - begin
        else:
            self._steps += 1
            self._done += self._operations[shape]
        if self._traced and number == self._traced.stop - 1:
            jax.block_until_ready((state, metrics))
            jax.profiler.stop_trace()
            self.restart()
        return state, metrics

    def lap(self, left: int) -> dict[str, float]:
        """What the log says of the steps since the last lap, all of which are finished; nothing where there was none.

        Hours are of training alone; memory is the most that a device of this process has held.

        Args:
            left: steps to go.
        """
        values, steps, seconds = {}, self._steps, time.perf_counter() - self._begin
        if steps:
            values["speed/step_seconds"] = seconds / steps
            values["speed/pairs_per_second"] = self._batch * steps / seconds
            values["speed/tflops_per_second"] = self._done / seconds / 1e12
            if self._peak:
                values["speed/share_of_peak"] = self._done / seconds / self._peak
            values["speed/hours_left"] = left * seconds / steps / 3600
        held = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
        if None not in held:
            values["memory/device_gib"] = max(held) / 2**30
        self.restart()
        return values
