"""What is said of a long work: a bar in a terminal, few plain lines in a log, nothing of the libraries."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hgdpo_jax.run import processes
from hgdpo_jax.run import progress as module
from hgdpo_jax.run.progress import Progress, say


class Clock:
    """Seconds, which pass when somebody says so."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(module, "time", found)
    return found


def lines(clock: Clock, capsys: pytest.CaptureFixture, total: int | None, seconds: float, steps: int) -> list[str]:
    """What a log holds of a work, each step of which takes so long."""
    bar = Progress(total=total, desc="pairs", unit="group")
    for _ in range(steps):
        clock.now += seconds
        bar.update()
    bar.close()
    said = capsys.readouterr()
    assert said.out == "" and "\r" not in said.err and "\x1b" not in said.err
    return said.err.splitlines()


def test_a_log_gets_a_line_for_each_tenth_half_a_minute_apart_and_five_minutes_at_most(
    clock: Clock, capsys: pytest.CaptureFixture
) -> None:
    assert lines(clock, capsys, 1000, 0.029, 1000) == []  # all in half a minute
    slow = lines(clock, capsys, 1000, 1.0, 1000)
    assert slow[0] == "pairs: group 100 of 1,000, 15:00 left"
    assert [line.split()[2] for line in slow] == [str(i) for i in range(100, 1000, 100)]
    assert [line.split()[2] for line in lines(clock, capsys, 100, 1.0, 100)] == ["30", "60", "90"]
    assert lines(clock, capsys, 1000, 100.0, 7) == [
        "pairs: group 3 of 1,000, 27:41:40 left",
        "pairs: group 6 of 1,000, 27:36:40 left",
    ]
    assert lines(clock, capsys, None, 100.0, 4) == ["pairs: group 3"]  # nobody knows of how many


def test_what_is_gone_on_with_reckons_with_its_own_steps(clock: Clock, capsys: pytest.CaptureFixture) -> None:
    bar = Progress(total=100, initial=60, desc="stage1", unit="step")
    clock.now = 40.0
    bar.update(10)
    assert capsys.readouterr().err == "stage1: step 70 of 100, 02:00 left\n"


def test_items_are_given_out_unchanged_and_counted(clock: Clock, capsys: pytest.CaptureFixture) -> None:
    bar = Progress(range(4), "decode", unit="batch")
    for item in bar:
        assert bar.n == item
        clock.now += 40.0
    assert capsys.readouterr().err.splitlines()[0] == "decode: batch 1 of 4, 02:00 left"


def test_figures_are_lines_ten_seconds_apart_and_the_last_is_always_there(
    clock: Clock, capsys: pytest.CaptureFixture
) -> None:
    bar = Progress(total=5, desc="stage1", unit="step", told=True)
    for step, seconds in enumerate((100.0, 4.0, 4.0, 4.0, 1.0), start=1):  # the first with its compilation
        clock.now += seconds
        bar.update()
        bar.tell(f"loss 0.{step}", 1.5)
    assert capsys.readouterr().err.splitlines() == [
        "stage1: step 1 of 5, loss 0.1, 1:30:00 left",
        "stage1: step 4 of 5, loss 0.4, 1:30:00 left",
        "stage1: step 5 of 5, loss 0.5",
    ]


def test_a_terminal_gets_the_bar(clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(total=3, desc="stage1", unit="step", ncols=80, mininterval=0.0) as bar:
        for _ in range(3):
            clock.now += 1000.0
            bar.update()
            bar.tell("loss 0.5", 1.5)
        say("compiling")
    shown = terminal.getvalue()
    assert "\r" in shown and "100%|" in shown and "loss 0.5" in shown and "left" not in shown
    assert capsys.readouterr().out == "compiling\n"


def test_other_processes_and_what_is_disabled_say_nothing(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    bars = [Progress(total=10, unit="step", disable=True)]
    monkeypatch.setattr(processes, "is_first", lambda: False)
    bars.append(Progress(total=10, unit="step"))
    for bar in bars:
        clock.now += 1000.0
        bar.update(5)
        bar.tell("loss 0.5")
    assert capsys.readouterr().err == ""


def test_that_there_is_no_pytorch_is_not_announced(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["torch"] = None
import importlib.util as util, importlib.metadata as metadata
spec = util.find_spec
util.find_spec = lambda name, *more: None if name.partition(".")[0] == "torch" else spec(name, *more)
from hgdpo_jax.run import command
def work():
    from transformers import CLIPTokenizer
    from transformers.utils import is_torch_available
    assert not is_torch_available()
command.run(work)
"""
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    environment.pop("TRANSFORMERS_NO_ADVISORY_WARNINGS", None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")
