"""What every command does, whatever it is about: in real processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hgdpo_jax.training import metrics
from hgdpo_jax.training.checkpoints import Checkpoints
from tests import tiny
from tests.patience import patience

TRAIN = """
import sys
from pathlib import Path
from hgdpo_jax import command
from hgdpo_jax.training.loop import train
from hgdpo_jax.training.monitor import Monitor
from tests import tiny
Monitor.look = tiny.glance
base, workdir = map(Path, sys.argv[1:])
command.run(lambda: train(tiny.config(base, steps=100_000), workdir))
"""


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_saves_the_step_and_is_one_line(sent: signal.Signals, code: int, tmp_path: Path) -> None:
    base, workdir = tiny.write_base(tmp_path / "base"), tmp_path / "run"
    tiny.write_pairs(workdir / "stage1" / "pairs")
    command = [sys.executable, "-c", TRAIN, str(base), str(workdir)]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + patience(50)
    while not (workdir / "stage1" / "policy" / "2.sha256.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(sent)
    errors = process.communicate(timeout=patience(15))[1]
    assert process.returncode == code and "Traceback" not in errors
    assert errors.strip().splitlines()[-1] == "stopped; the same command goes on from what is finished"
    latest = Checkpoints(workdir / "stage1").latest()
    assert latest == metrics.read(workdir / "stage1" / "logs")[-1]["step"] >= 2


@pytest.mark.parametrize("home", ["/dev/null/nobody", None])
def test_without_a_home_it_runs_without_a_cache(home: str | None, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"HOME": home, "PYTHONPATH": os.getcwd()} if home else {"PYTHONPATH": os.getcwd()}
    code = "from hgdpo_jax import command; command.run(lambda: print('ran'))"
    if home is None:  # nor an entry for this user
        code = "import pathlib; pathlib.Path.home = lambda: (_ for _ in ()).throw(RuntimeError('no home')); " + code
    run = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "ran\n")
    (line,) = run.stderr.splitlines()
    assert line.startswith("no compilation cache: ") and "JAX_COMPILATION_CACHE_DIR" in line


STUBBORN = """
import contextlib, sys, time
from hgdpo_jax import command, processes
def stubborn():
    with processes.stopping if sys.argv[1:] else contextlib.nullcontext():
        print("begun", flush=True)
        while True:
            try:
                time.sleep(60)
            except KeyboardInterrupt:
                pass
command.run(stubborn)
"""


@pytest.mark.parametrize("patient", [[], ["patient"]])
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_ends_what_swallows_it_and_a_second_one_what_is_to_save(
    sent: signal.Signals, code: int, patient: list[str]
) -> None:
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", STUBBORN, *patient], env=environment, text=True, **pipes)
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    process.send_signal(sent)
    if patient:
        assert process.stderr is not None
        lines = [process.stderr.readline().strip() for _ in range(2)]
        assert lines == ["", "stopping once this step is saved; a second signal stops at once"]
        process.send_signal(sent)
    errors = process.communicate(timeout=patience(15))[1]
    assert errors.strip() == "stopped; the same command goes on from what is finished"
    assert process.returncode == code
