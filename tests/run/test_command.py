"""What every command does, whatever it is about: in real processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hgdpo_jax.devices import start
from hgdpo_jax.run import command
from hgdpo_jax.run.errors import _MEMORY, UserError
from hgdpo_jax.training import metrics
from hgdpo_jax.training.checkpoints import Checkpoints
from tests import tiny
from tests.patience import patience
from tests.processes.start import WITHOUT_TORCH

STOPPED = "stopped; the same command goes on from what is finished"
TRAIN = f"""{WITHOUT_TORCH}
from pathlib import Path
from hgdpo_jax.devices.start import start
from hgdpo_jax.run import command
from hgdpo_jax.training.loop import train
from hgdpo_jax.training.monitor import Monitor
from tests import tiny
Monitor.evaluate = tiny.glance
base, workdir = map(Path, sys.argv[1:])
command.run(lambda: (start(), train(tiny.config(base, steps=100_000), workdir)))
"""


def begin(code: str, *arguments: str) -> subprocess.Popen[str]:
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "XLA_FLAGS": flags}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment, text=True, **pipes)


def test_a_signal_saves_the_step_and_is_one_line(one_level: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    tiny.write_pairs(workdir / "stage1" / "pairs")
    process = begin(TRAIN, str(one_level), str(workdir))
    deadline = time.monotonic() + patience(50)
    while not (workdir / "stage1" / "policy" / "2.sha256.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=patience(15))[1]
    assert process.returncode == 75 and "Traceback" not in errors
    assert errors.strip().splitlines()[-1] == STOPPED
    latest = Checkpoints(workdir / "stage1").latest()
    assert latest == metrics.read(workdir / "stage1" / "logs")[-1]["step"] >= 2


STUBBORN = """
import sys, time
from hgdpo_jax.run import command, lifecycle
def stubborn():
    lifecycle.start()
    lifecycle.stopping.patient = bool(sys.argv[1:])
    print("begun", flush=True)
    while True:
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            pass
command.run(stubborn)
"""


@pytest.mark.parametrize(("sent", "code", "patient"), [(signal.SIGINT, 130, []), (signal.SIGTERM, 75, ["patient"])])
def test_a_signal_ends_what_swallows_it_and_a_second_one_what_is_to_save(
    sent: signal.Signals, code: int, patient: list[str]
) -> None:
    process = begin(STUBBORN, *patient)
    assert process.stdout is not None and process.stderr is not None and process.stdout.readline() == "begun\n"
    process.send_signal(sent)
    if patient:
        lines = [process.stderr.readline().strip() for _ in range(2)]
        assert lines == ["", "stopping once this step is saved; a second signal stops at once"]
        process.send_signal(sent)
    assert process.communicate(timeout=patience(15))[1].strip() == STOPPED
    assert process.returncode == code


HEAVY = ("jax", "numpy", "flax", "orbax", "grain", "tensorflow_datasets", "transformers", "matplotlib", "PIL", "rich")
TYPO = """
import sys
from importlib import import_module
name, heavy = sys.argv[1:3]
sys.argv[1:] = sys.argv[3:]
try:
    import_module(name).cli()
finally:
    print(*set(sys.modules) & set(heavy.split(",")))
"""


@pytest.mark.parametrize(
    ("name", "arguments", "code", "line"),
    [
        *((name, ("--config", "configs/stage1.py:portraits", "--workdir", "W", "--config.train.lrr=1"), 1,
           "error: config key train.lrr: unknown; did you mean train.lr?") for name in ("main", "pairs", "evaluate")),
        ("plan", ("--config", "configs/stage1.py:portraits", "--config.train.lrr=1"), 1,
         "error: config key train.lrr: unknown; did you mean train.lr?"),
        ("sample", ("--workdir", "W", "--prompt", "p", "--out", "O", "--steps", "0"), 1,
         "error: --steps 0: expects a number from 1"),
        ("sample", ("--workdir", "W"), 2, "error: an argument cannot be read, see above"),
        ("export", ("--workdir", "gs://bucket/run", "--out", "O"), 1, "error: gs://bucket/run: is object storage, "),
    ],
)  # fmt: skip
def test_a_mistake_is_answered_before_anything_heavy_is_imported(
    name: str, arguments: tuple[str, ...], code: int, line: str
) -> None:
    process = begin(TYPO, f"hgdpo_jax.{name}", ",".join(HEAVY), *arguments)
    out, errors = process.communicate(timeout=patience(15))
    assert (process.returncode, out) == (code, "\n") and errors.splitlines()[-1].startswith(line)


def no_home() -> Path:
    raise RuntimeError("no home")


@pytest.mark.parametrize("home", [lambda: Path("/dev/null/nobody"), no_home])
def test_without_a_home_it_runs_without_a_cache(
    home: Callable[[], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setattr(Path, "home", home)
    start._use_cache()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("no compilation cache: ") and "JAX_COMPILATION_CACHE_DIR" in line


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("config key x: is wrong"), 1, "error: config key x: is wrong"),
        (UserError("a\nb\u2028c.png: no such file"), 1, r"error: a\nb\u2028c.png: no such file"),  # names of files
        (SystemExit(2), 2, "error: an argument cannot be read, see above"),
        (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device; free some disk space, "
         "the same command then goes on"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 29000000000 bytes."), 1,
         "error: a device ran out of memory: RESOURCE_EXHAUSTED: Out of memory while trying to allocate 29000000000 "
         f"bytes.; {_MEMORY}"),
        (RuntimeError(f"RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.\n\n{999 * 'x'}"), 1,
         "error: a device ran out of memory: RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. "
         f"{241 * 'x'}…; {_MEMORY}"),
        (RuntimeError("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory"), 1,
         f"error: a device ran out of memory: INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory; {_MEMORY}"),
        (MemoryError(), 1, f"error: the host ran out of memory: MemoryError; {_MEMORY}"),
        (MemoryError("Unable to allocate 7.28 TiB for an array with shape (1000000, 1000000)"), 1,
         "error: the host ran out of memory: Unable to allocate 7.28 TiB for an array with shape (1000000, 1000000); "
         f"{_MEMORY}"),
        (OSError(12, "Cannot allocate memory"), 1,
         f"error: the host ran out of memory: [Errno 12] Cannot allocate memory; {_MEMORY}"),
    ],
)  # fmt: skip
def test_what_the_user_can_mend_is_one_line(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture
) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        command.run(fail)
    assert (ended.value.code, capsys.readouterr().err) == (code, f"{line}\n")


def test_an_error_of_the_program_keeps_its_traceback_and_help_is_no_error() -> None:
    grpc = RuntimeError("RESOURCE_EXHAUSTED: Received message larger than max (8 vs. 4)")
    for error in (ZeroDivisionError(), SystemExit(0), grpc):

        def fail(error: BaseException = error) -> None:
            raise error

        with pytest.raises(type(error)):
            command.run(fail)
