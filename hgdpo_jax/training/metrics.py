"""Training metrics: kept on the devices between two log lines, then averaged, checked and written to TensorBoard."""

import functools
import json
import math
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8

from hgdpo_jax.config import PREFERENCE
from hgdpo_jax.pictures.write import write_png
from hgdpo_jax.run import processes
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import as_written, atomic_path
from hgdpo_jax.training.board import Board
from hgdpo_jax.training.changes import GO_ON
from hgdpo_jax.training.step import GRADIENT_NORM, TIMESTEP_BINS

if TYPE_CHECKING:
    import tensorboardX

# The latter ones where there is one.
HELDOUT_LOSSES = ("heldout/loss/total", *(f"heldout/loss/{objective}" for objective in PREFERENCE))
SAMPLES, PROMPTS = "samples", "prompts"  # of what a look draws
SHOWN = 8  # held-out captions of which it does
FACES = "heldout/faces_found"  # share of these pictures
Line = Mapping[str, float]  # of a log
StepMetrics = Mapping[str, Float[Array | np.ndarray | np.float32, "..."]]


class MetricLog:
    """Averages of the steps since they were last asked for, and what is written to TensorBoard and metrics.jsonl.

    Args:
        folder: of the log.
        done: the step that the training goes on from. What a run that was killed had logged beyond it comes again, so
            it is taken away.
        board: of W&B, which gets the same.
    """

    def __init__(self, folder: Path, done: int, board: Board | None = None) -> None:
        self._folder, self._lines, self._board = folder, folder / "metrics.jsonl", board
        self._steps: dict[int, StepMetrics] = {}
        if not processes.is_first():
            return
        folder.mkdir(parents=True, exist_ok=True)
        # An evaluation counts once its line is there, which is written last.
        evaluated = was_evaluated(folder, done)

        def comes_again(step: float, names: Iterable[str]) -> bool:
            return step > done or (step == done and not evaluated and any(map(_of_evaluation, names)))

        if self._lines.is_file():
            kept = [line for line in _whole_lines(self._lines) if not comes_again(line["step"], line)]
            with atomic_path(self._lines) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        for file in folder.glob("events.out.tfevents.*"):
            _cut_events(file, comes_again)

    @functools.cached_property
    def _writer(self) -> "tensorboardX.SummaryWriter":
        """Opened by the first value: from Python 3.12 on, one that got none cannot close itself when Python exits.
        Imported with it: it brings PyTorch where that is installed, which takes a second."""
        from tensorboardX import SummaryWriter

        return SummaryWriter(str(self._folder))

    def add(self, step: int, metrics: StepMetrics) -> None:
        """Remembers one step's metrics without waiting for them."""
        self._steps[step] = metrics

    def means(self) -> dict[str, float]:
        """Means over the remembered steps, for which it waits.

        Raises:
            UserError: a loss or a gradient is NaN or infinite.
        """
        steps = jax.device_get(self._steps)
        self._steps = {}
        for number, metrics in steps.items():
            for name in [*(name for name in metrics if name.startswith("loss/")), GRADIENT_NORM]:
                if not np.isfinite(value := metrics[name]):
                    raise UserError(f"{name} is {value} at step {number}: training stopped, the last good checkpoint "
                                    f"is kept; {GO_ON}")  # fmt: skip
        return average(list(steps.values()))

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Scalars. Process 0 writes."""
        if not processes.is_first():
            return
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()
        with self._lines.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._board is not None:
            self._board.write(values, step)

    def samples(self, name: str, picture: UInt8[np.ndarray, "H W 3"], step: int) -> None:
        """What a look draws, in TensorBoard and as NAME/STEP.png. Process 0 writes."""
        if not processes.is_first():
            return
        self._writer.add_image(name, picture, step, dataformats="HWC")
        self._writer.flush()
        (self._folder / name).mkdir(exist_ok=True)
        write_png(self._folder / name / f"{step}.png", picture, {})
        if self._board is not None:
            self._board.picture(name, picture, step)


def _of_evaluation(name: str) -> bool:
    return name in (SAMPLES, PROMPTS) or name.startswith("heldout/")


def _whole_lines(path: Path) -> list[dict[str, float]]:
    """What follows the last end of a line is half a line of a run that was killed, and not read."""
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        with as_written(f"{path} line {number}", "take that line out"):
            values = {name: value + 0 for name, value in json.loads(line).items()}  # raises where it is no number
            found.append(values | {"step": operator.index(values["step"])})
    return found


def _cut_events(path: Path, comes_again: Callable[[float, Iterable[str]], bool]) -> None:
    """Ends a file of TensorBoard's before the first event that comes again, or that is not whole.

    An event is a length of eight bytes and a checksum of four, so many bytes, and a checksum of four.
    """
    from tensorboardX.proto.event_pb2 import Event

    content, end = path.read_bytes(), 0
    while end + 12 <= len(content):
        length = int.from_bytes(content[end : end + 8], "little")
        if end + length + 16 > len(content):
            break
        event = Event.FromString(content[end + 12 : end + 12 + length])
        if comes_again(event.step, [value.tag for value in event.summary.value]):
            break
        end += length + 16
    os.truncate(path, end)


def read(folder: Path) -> list[dict[str, float]]:
    """The values in metrics.jsonl by step, in the order of their steps."""
    path = folder / "metrics.jsonl"
    steps: dict[int, dict[str, float]] = {}
    for values in _whole_lines(path) if path.is_file() else []:
        steps.setdefault(int(values["step"]), {}).update(values)
    return [steps[step] for step in sorted(steps)]


def was_evaluated(folder: Path, step: int) -> bool:
    """Whether held-out pairs were measured at a step."""
    return any(line["step"] == step and any(map(_of_evaluation, line)) for line in read(folder))


def heldout_losses(folder: Path) -> dict[int, float]:
    """By step the loss of the held-out pairs, or, where there is no preference, photographs."""
    losses = {int(line["step"]): line[name] for line in read(folder) for name in HELDOUT_LOSSES if name in line}
    return {step: loss for step, loss in losses.items() if math.isfinite(loss)}


def average(steps: Sequence[StepMetrics]) -> dict[str, float]:
    """Means over steps; accuracy by timestep bin is the sum of right answers over the number of pairs in the bin."""
    stacked = {name: np.stack([np.asarray(s[name], np.float64) for s in steps]) for name in steps[0]}
    values = {name: float(value.mean()) for name, value in stacked.items() if not name.startswith("bins/")}
    if "bins/accuracy" in stacked:
        right, share = stacked["bins/accuracy"].sum(0), stacked["bins/share"].sum(0)
        for i in range(TIMESTEP_BINS):
            if share[i] > 0:
                values[f"accuracy_by_timestep/{i * 1000 // TIMESTEP_BINS:03d}"] = float(right[i] / share[i])
    return values
