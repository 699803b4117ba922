"""Training metrics: kept on the devices between two log lines, then averaged, checked and written to TensorBoard."""

import json
from pathlib import Path

import jax
import numpy as np
from tensorboardX import SummaryWriter

from hgdpo_jax.errors import UserError
from hgdpo_jax.training.step import TIMESTEP_BINS, Metrics


class MetricLog:
    """Averages of the steps since the last flush: in TensorBoard, in metrics.jsonl, and returned as plain numbers."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._lines = folder / "metrics.jsonl"
        self._writer = SummaryWriter(str(folder))
        self._steps: list[Metrics] = []

    def add(self, metrics: Metrics) -> None:
        """Remembers one step's metrics without waiting for them."""
        self._steps.append(metrics)

    def flush(self, step: int) -> dict[str, float]:
        """Means over the remembered steps, written under `step`.

        Raises:
            UserError: a loss is NaN or infinite.
        """
        steps = jax.device_get(self._steps)
        self._steps = []
        values = average(steps)
        for name, value in values.items():
            if name.startswith("loss/") and not np.isfinite(value):
                raise UserError(
                    f"{name} is {value} at or before step {step}: training stopped, the last good checkpoint is kept; "
                    "lower config.train.lr or config.train.beta and run again"
                )
        self.write(values, step)
        return values

    def write(self, values: dict[str, float], step: int) -> None:
        """Scalars as they are."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()
        with self._lines.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def images(self, name: str, grid: np.ndarray, step: int) -> None:
        """A picture uint8 [H, W, 3]."""
        self._writer.add_image(name, grid, step, dataformats="HWC")
        self._writer.flush()


def read(folder: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl in the order of their steps; where a resumed run wrote a value again, the last."""
    path = folder / "metrics.jsonl"
    steps: dict[int, dict[str, float]] = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        values = json.loads(line)
        steps.setdefault(values["step"], {}).update(values)
    return [steps[step] for step in sorted(steps)]


def average(steps: list[Metrics]) -> dict[str, float]:
    """Means over steps; accuracy by timestep bin is the sum of right answers over the number of pairs in the bin."""
    stacked = {name: np.stack([np.asarray(s[name], np.float64) for s in steps]) for name in steps[0]}
    values = {name: float(value.mean()) for name, value in stacked.items() if not name.startswith("bins/")}
    if "bins/accuracy" in stacked:
        right, share = stacked["bins/accuracy"].sum(0), stacked["bins/share"].sum(0)
        for i in range(TIMESTEP_BINS):
            if share[i] > 0:
                values[f"accuracy_by_timestep/{i * 1000 // TIMESTEP_BINS:03d}"] = float(right[i] / share[i])
    return values
