"""Starts commands as several processes, as a pod does, on this machine."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from tests.patience import patience

SECONDS = 100.0  # that a chain of commands takes at most, see :func:`tests.patience.patience`
DEAD = patience(4)  # seconds without a sign of life, of processes that lie on one machine
# What comes before a program: users have none of these packages, though they are installed for the tests.
WITHOUT_TORCH = """
import sys
sys.modules.update(dict.fromkeys(("torch", "diffusers", "peft")))
"""
# Runs main of each command in turn, with "then" between them. Process 1 may hash no file but the photographs of its own
# shards. Looks at a training and the judges' networks, which compile long and are tested elsewhere, are left out.
COMMANDS = f"""{WITHOUT_TORCH}
import numpy, os
from importlib import import_module
from hgdpo_jax.run import command, index, lifecycle
from hgdpo_jax.training.monitor import Monitor
from tests import tiny
Monitor.evaluate = tiny.glance
lifecycle._DEAD, lifecycle._DEAD_FOR_JAX = {DEAD}, {8 * int(DEAD)}
def seen(images, input_ids):
    means = numpy.asarray(images).mean((1, 2))
    one = {{name: means[:, 0] for name in ("face_found", "face_score", "sharpness", "score")}}
    return one | {{"face_embedding": means, "embedding": means, "hue": means[:, :2]}}
if os.environ.get("JAX_PROCESS_ID", "0") != "0":
    content = index.Index.hash
    def of_photograph(known, path):
        assert path.suffix == ".jpg", path
        return content(known, path)
    index.Index.hash = of_photograph
def main():
    left = sys.argv[1:]
    while left:
        end = left.index("then") if "then" in left else len(left)
        sys.argv, left = left[:end], left[end + 1 :]
        module = import_module(f"hgdpo_jax.{{sys.argv[0]}}")
        if sys.argv[0] == "evaluate":
            from hgdpo_jax.results import evaluation
            evaluation.Judges = lambda *_: seen
        module.main()
command.run(main)
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
        self,
        folder: Path,
        count: int,
        devices: int,
        *commands: list[str],
        own: dict[int, list[str]] | None = None,
        program: str = COMMANDS,
        missing: int | None = None,
    ):
        """
        Args:
            folder: gets what they say.
            count: of processes.
            devices: of each.
            *commands: names with their arguments, which each process runs in turn.
            own: further arguments of some processes.
            program: in Python, gets the commands' words, with "then" between commands.
            missing: a process that does not come.
        """
        folder.mkdir(parents=True, exist_ok=True)
        indices = [index for index in range(count) if index != missing]
        self.logs = [(folder / f"{index}.out", folder / f"{index}.err") for index in indices]
        with socket.socket() as free:
            free.bind(("localhost", 0))
            self.address = f"localhost:{free.getsockname()[1]}"
        flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
        environment = os.environ | {"PYTHONPATH": os.getcwd(), "XLA_FLAGS": flags}
        if count > 1:
            environment |= {"HGDPO_DISTRIBUTED": "1", "JAX_COORDINATOR_ADDRESS": self.address}
            environment |= {"JAX_NUM_PROCESSES": str(count)}
        arguments = [word for command in commands for word in ["then", *command]][1:]
        self.processes = []
        for index, (out, errors) in zip(indices, self.logs, strict=True):
            command = [sys.executable, "-c", program, *arguments, *(own or {}).get(index, [])]
            with out.open("w") as to_out, errors.open("w") as to_errors:
                mine = environment | ({"JAX_PROCESS_ID": str(index)} if count > 1 else {})
                self.processes.append(subprocess.Popen(command, env=mine, stdout=to_out, stderr=to_errors))

    def wait_for(self, path: Path) -> None:
        """Until a file is there."""
        deadline = time.monotonic() + patience(SECONDS)
        while not path.exists():
            if time.monotonic() > deadline or any(process.poll() is not None for process in self.processes):
                self._kill()
                raise AssertionError("\n".join(errors.read_text() for _, errors in self.logs))
            time.sleep(0.02)

    def ended(self, seconds: float = SECONDS) -> list[Ended]:
        """Waits for all, which takes so many seconds at most; see :func:`tests.patience.patience`."""
        begin, found = time.monotonic(), []
        for process, (out, errors) in zip(self.processes, self.logs, strict=True):
            try:
                code = process.wait(patience(seconds))
            except subprocess.TimeoutExpired:
                self._kill()
                raise AssertionError("\n".join(errors.read_text() for _, errors in self.logs)) from None
            found.append(Ended(code, out.read_text(), errors.read_text(), time.monotonic() - begin))
        return found

    def _kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def run(folder: Path, count: int, devices: int, *commands: list[str]) -> None:
    """Runs commands that are to succeed."""
    for index, process in enumerate(Started(folder, count, devices, *commands).ended()):
        assert process.code == 0, process.errors
        assert "Traceback" not in process.errors
        assert index == 0 or "stage1" not in process.out  # process 0 speaks for all; the rest is Gloo's
