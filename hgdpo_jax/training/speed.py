"""How fast a training is: the time of its steps alone, and the share of what its devices can do at most."""

import time
from contextlib import ExitStack
from pathlib import Path

import jax

from hgdpo_jax.run import processes
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.progress import say
from hgdpo_jax.training.cost import operations
from hgdpo_jax.training.step import Batch, Metrics, Numbers, Params, TrainState


def remaining_steps(traced: range, done: int, steps: int) -> range:
    """The steps of `traced` that are still to go, after `done` of `steps`.

    Raises:
        UserError: some are to be traced, but none of them is to go.
    """
    left = range(max(traced.start, done + 1), min(traced.stop, steps + 1))
    if traced and not left:
        raise UserError(f"argument --profile {traced.start}:{traced.stop}: the steps to go are {done + 1} to {steps}")
    return left


class Speed:
    """Runs the steps of a stage on a clock that stands still while a step is compiled, and that counts nothing between
    the last :meth:`lap` and a :meth:`restart`. A `with` block ends a trace that is being written.

    Args:
        step: the jitted step, see :func:`hgdpo_jax.training.step.make_step`.
        batch: examples of a step.
        peak: operations a second that all devices do together at most, or None.
        traced: steps whose JAX trace is written, by process 0.
        folder: for the trace.
    """

    def __init__(
        self,
        step: jax.stages.Wrapped,
        batch: int,
        peak: float | None,
        traced: range = range(0),
        folder: Path = Path(),
    ) -> None:
        self._step, self._batch, self._peak, self._folder = step, batch, peak, folder
        self._traced = traced if processes.is_first() else range(0)
        self._operations: dict[tuple[int, ...], float] = {}  # shape of a batch's latents → of its step
        self._running: Metrics = {}
        self._trace = ExitStack()
        self.restart()

    def restart(self) -> None:
        """Starts the clock anew, without the steps since the last :meth:`lap`."""
        self._begin, self._steps, self._done = time.perf_counter(), 0, 0.0

    def step(
        self, number: int, state: TrainState, reference: Params, frozen: Params, batch: Batch, numbers: Numbers
    ) -> tuple[TrainState, Metrics]:
        """Gives the step `number` to the devices. Waits for it only if it must be compiled or is the last that is
        traced."""
        if self._traced and number == self._traced.start:
            jax.profiler.start_trace(self._folder)
            self._trace.callback(jax.profiler.stop_trace)
        arguments, shape = (state, reference, frozen, batch, numbers), batch["winner"].shape
        new = shape not in self._operations
        if new:
            if processes.is_first():
                size = "x".join(map(str, shape[1:-1]))
                say(f"compiling the step for latents of {size}, once for each resolution")
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
            self._trace.close()
            self.restart()
        return state, metrics

    def __enter__(self) -> "Speed":
        return self

    def __exit__(self, *_: object) -> None:
        self._trace.close()  # of a training that ends before the last step that is traced

    def lap(self, left: int) -> dict[str, float]:
        """Speed of the steps since the last lap, all of which are finished, for the log; nothing where there was none.

        Hours are of training alone; memory is the most that a device of this process has held.

        Args:
            left: steps to go.
        """
        values: dict[str, float] = {}
        steps, seconds = self._steps, time.perf_counter() - self._begin
        if steps:
            values["speed/step_seconds"] = seconds / steps
            values["speed/pairs_per_second"] = self._batch * steps / seconds
            values["speed/tflops_per_second"] = self._done / seconds / 1e12
            if self._peak:
                values["speed/share_of_peak"] = self._done / seconds / self._peak
            values["speed/hours_left"] = left * seconds / steps / 3600
        memory = max((device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices())
        if memory:
            values["memory/device_gib"] = memory / 2**30
        self.restart()
        return values
