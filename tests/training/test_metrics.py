"""The metric log, and what is averaged in it."""

from pathlib import Path

import numpy as np
import pytest

from hgdpo_jax.run.errors import UserError
from hgdpo_jax.training.metrics import MetricLog, average, read


def test_no_event_file_is_opened_before_the_first_value(tmp_path: Path) -> None:
    log = MetricLog(tmp_path)
    assert not list(tmp_path.iterdir())
    log.write({"loss": 0.5}, 3)
    assert len(list(tmp_path.glob("events.*"))) == 1
    assert read(tmp_path) == [{"step": 3, "loss": 0.5}]


def test_half_a_line_of_the_log_is_forgotten(tmp_path: Path) -> None:
    log = MetricLog(tmp_path)
    log.write({"a": 1.0}, 1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "a')
    assert read(tmp_path) == [{"step": 1, "a": 1.0}]
    MetricLog(tmp_path).write({"a": 3.0}, 2)
    assert read(tmp_path) == [{"step": 1, "a": 1.0}, {"step": 2, "a": 3.0}]


def test_a_gradient_that_is_no_number_stops_at_its_step_whatever_the_loss(tmp_path: Path) -> None:
    log = MetricLog(tmp_path)
    for step, norm in ((1, 1.0), (2, np.nan), (3, 1.0)):
        log.add(step, {"loss/total": np.float32(0.7), "gradient_norm": np.float32(norm)})
    with pytest.raises(UserError, match="gradient_norm is nan at step 2: training stopped"):
        log.means()


def test_accuracy_by_timestep_is_right_answers_over_pairs_of_a_tenth() -> None:
    """Four pairs a step: three and one at the lowest tenth, with three answers right together; one at 900, right."""
    right, share = np.zeros((2, 10)), np.zeros((2, 10))
    share[:, 0], share[1, 9] = (3 / 4, 1 / 4), 1 / 4
    right[:, 0], right[1, 9] = (3 / 4, 0.0), 1 / 4
    steps = [{"loss": np.float32(i), "bins/accuracy": right[i], "bins/share": share[i]} for i in range(2)]
    found = average(steps)
    assert found == {"loss": 0.5, "accuracy_by_timestep/000": 0.75, "accuracy_by_timestep/900": 1.0}
