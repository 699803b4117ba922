"""Starts a command as several processes, as a pod does, on this machine."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

# Runs a command's main; process 1 may read no file for its content but what it writes. People's looks and the judges'
# networks, which compile long and are tested elsewhere, are left out.
COMMAND = """
import numpy, os, sys
sys.modules["torch"] = None  # users need none; tensorboardX imports it where it is installed
from importlib import import_module
from hgdpo_jax.run import command, index, lifecycle, processes
from hgdpo_jax.training.monitor import Monitor
from tests import tiny
Monitor.evaluate = tiny.glance
lifecycle._DEAD, processes._VISIBLE = 15.0, 3  # the tests' processes lie on one machine
def seen(images, input_ids):
    means = numpy.asarray(images).mean((1, 2))
    one = {name: means[:, 0] for name in ("face_found", "face_score", "sharpness", "score")}
    return one | {"face_embedding": means, "embedding": means, "hue": means[:, :2]}
module = import_module(f"hgdpo_jax.{sys.argv[1]}")
if sys.argv[1] == "evaluate":
    from hgdpo_jax.results import evaluation
    evaluation.Judges = lambda *_: seen
if os.environ.get("JAX_PROCESS_ID", "0") != "0":
    index.Index.hash = None
sys.argv = sys.argv[1:]
command.run(module.main)
"""


class Ended(NamedTuple):
    """A process that has ended: exit code, what it wrote, and after how many seconds."""

    code: int
    out: str
    errors: str
    after: float


class Started:
    """Processes that run."""

    def __init__(
        self, folder: Path, count: int, devices: int, *arguments: str, own: dict[int, list[str]] | None = None
    ):
        """Args: `own` are further arguments of some processes."""
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [(folder / f"{index}.out", folder / f"{index}.err") for index in range(count)]
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
        environment = os.environ | {"PYTHONPATH": os.getcwd(), "XLA_FLAGS": flags}
        if count > 1:
            environment |= {"HGDPO_DISTRIBUTED": "1", "JAX_COORDINATOR_ADDRESS": f"localhost:{port}"}
            environment |= {"JAX_NUM_PROCESSES": str(count)}
        self.processes = []
        for index, (out, errors) in enumerate(self.logs):
            command = [sys.executable, "-c", COMMAND, *arguments, *(own or {}).get(index, [])]
            with out.open("w") as to_out, errors.open("w") as to_errors:
                mine = environment | ({"JAX_PROCESS_ID": str(index)} if count > 1 else {})
                self.processes.append(subprocess.Popen(command, env=mine, stdout=to_out, stderr=to_errors))

    def wait_for(self, path: Path) -> None:
        """Until a file is there."""
        deadline = time.monotonic() + 200
        while not path.exists():
            assert time.monotonic() < deadline
            assert all(process.poll() is None for process in self.processes), self.logs[0][1].read_text()
            time.sleep(0.02)

    def ended(self, timeout: float = 200) -> list[Ended]:
        """Waits for all."""
        begin, found = time.monotonic(), []
        for process, (out, errors) in zip(self.processes, self.logs, strict=True):
            code = process.wait(timeout)
            found.append(Ended(code, out.read_text(), errors.read_text(), time.monotonic() - begin))
        return found


def run(folder: Path, count: int, devices: int, *arguments: str) -> None:
    """Runs a command that is to succeed."""
    for index, process in enumerate(Started(folder, count, devices, *arguments).ended()):
        assert process.code == 0, process.errors
        assert "Traceback" not in process.errors
        assert index == 0 or "stage1" not in process.out  # process 0 speaks for all; the rest is Gloo's
