"""The metric log, and what is averaged in it."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from hgdpo_jax.run.errors import UserError
from hgdpo_jax.training.metrics import SAMPLES, MetricLog, average, read, was_evaluated


def test_no_event_file_is_opened_before_the_first_value(tmp_path: Path) -> None:
    log = MetricLog(tmp_path, 0)
    assert not list(tmp_path.iterdir())
    log.write({"loss": 0.5}, 3)
    assert len(list(tmp_path.glob("events.*"))) == 1
    assert read(tmp_path) == [{"step": 3, "loss": 0.5}]


@pytest.mark.parametrize("line", ["{", "[]", "null", '{"a": 1.0}', '{"step": "2"}', '{"step": 2, "a": "x"}', "\xff"])
def test_a_line_of_the_log_that_is_none_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line.encode("latin-1") + b'\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl line 2: is not as it was written \(.*\); take that line out"):
        read(tmp_path)


def test_half_a_line_of_the_log_is_forgotten(tmp_path: Path) -> None:
    log = MetricLog(tmp_path, 0)
    log.write({"a": 1.0}, 1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "a')
    assert read(tmp_path) == [{"step": 1, "a": 1.0}]
    MetricLog(tmp_path, 1).write({"a": 3.0}, 2)
    assert read(tmp_path) == [{"step": 1, "a": 1.0}, {"step": 2, "a": 3.0}]


def logged(folder: Path) -> list[tuple[int, str]]:
    """Step and name of each value, of metrics.jsonl and of TensorBoard's files as they lie there; both have the same,
    but for pictures."""
    found = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        found += [(values["step"], name) for name in values if name != "step"]
    events, files = [], sorted(folder.glob("events.*"))
    for file in files:
        content = file.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")
            event = Event.FromString(content[12 : 12 + length])
            events += [(event.step, value.tag) for value in event.summary.value]
            content = content[16 + length :]
    assert sorted(found) == sorted(event for event in events if event[1] != SAMPLES)
    return events


def evaluate(log: MetricLog, step: int) -> None:
    log.samples(SAMPLES, np.zeros((8, 8, 3), np.uint8), step)
    log.write({"heldout/loss": float(step), "heldout/x": 0.0}, step)


@pytest.mark.parametrize("done", [0, 4, 7, 8, 12])
@pytest.mark.parametrize("starts", [1, 3])
def test_no_step_is_logged_twice_after_a_kill(done: int, starts: int, tmp_path: Path) -> None:
    """A training to step 12 that looks at its first step and at every fourth is killed at its end, and goes on from an
    older checkpoint."""
    for number, start in enumerate((0, *[done] * starts)):
        log = MetricLog(tmp_path, start)
        if not was_evaluated(tmp_path, start) and start % 4 == 0:
            evaluate(log, start)
        for step in range(start + 1, 13):
            log.write({"loss": 1.0 / step, "rate": 0.1}, step)
            if step % 4 == 0:
                evaluate(log, step)
        log._writer.close()
        (file,) = tmp_path.glob("events.out.tfevents.1*")
        file.rename(tmp_path / f"events.out.tfevents.0{number}")  # the next one may be of the same second
    steps = [(step, name) for step in range(1, 13) for name in ("loss", "rate")]
    looks = [(step, name) for step in range(0, 13, 4) for name in (SAMPLES, "heldout/loss", "heldout/x")]
    assert sorted(logged(tmp_path)) == sorted(steps + looks)


@pytest.mark.parametrize("part", ["picture", "scalars", "line", "half an event", "half a length"])
def test_an_evaluation_that_was_killed_is_not_there_twice(part: str, tmp_path: Path) -> None:
    log = MetricLog(tmp_path, 0)
    log.write({"loss": 1.0}, 4)
    log.samples(SAMPLES, np.zeros((8, 8, 3), np.uint8), 4)
    if part in ("scalars", "line"):
        log.write({"heldout/loss": 4.0, "heldout/x": 0.0}, 4)
    log._writer.close()
    if part == "scalars":
        lines = tmp_path / "metrics.jsonl"
        lines.write_text(lines.read_text().splitlines(keepends=True)[0] + '{"step": 4, "heldout/l')
    (file,) = tmp_path.glob("events.*")
    if part.startswith("half"):
        os.truncate(file, file.stat().st_size - 3)
        if part == "half a length":
            file.write_bytes(file.read_bytes() + bytes(5))
    log = MetricLog(tmp_path, 4)
    assert was_evaluated(tmp_path, 4) is (part == "line")
    file.rename(file.with_name("events.out.tfevents.0"))  # the next one may be of the same second
    if part != "line":
        evaluate(log, 4)
        log._writer.close()
    names = ("loss", SAMPLES, "heldout/loss", "heldout/x")
    assert sorted(logged(tmp_path)) == sorted((4, name) for name in names)


def test_a_gradient_that_is_no_number_stops_at_its_step_whatever_the_loss(tmp_path: Path) -> None:
    log = MetricLog(tmp_path, 0)
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
