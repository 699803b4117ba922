"""The metric log."""

from pathlib import Path

from hgdpo_jax.training.metrics import MetricLog, read


def test_no_event_file_is_opened_before_the_first_value(tmp_path: Path) -> None:
    log = MetricLog(tmp_path)
    assert not list(tmp_path.iterdir())
    log.write({"loss": 0.5}, 3)
    assert len(list(tmp_path.glob("events.*"))) == 1
    assert read(tmp_path) == [{"step": 3, "loss": 0.5}]
