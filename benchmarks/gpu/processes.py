"""A process that a worker talks to: a line of JSON in, a line of JSON out."""

import ctypes
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

_PARENT_DEATH = 1  # PR_SET_PDEATHSIG of Linux


class Failed(Exception):
    """What another process said went wrong."""


class Process:
    """`python -m benchmarks.gpu.MODULE`, which answers at once what it has prepared, or `{"failed": why}`.

    Raises:
        Failed: it could not be prepared.
    """

    def __init__(self, module: str, *arguments: str, environment: dict[str, str]) -> None:
        command = [sys.executable, "-W", "ignore", "-m", f"benchmarks.gpu.{module}", *arguments]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment
        )
        self.answer: dict[str, Any] = {}

    def prepare(self) -> None:
        """Waits for the answer."""
        self.answer = self._read()

    def ask(self, name: str, count: int) -> None:
        """Has it run something so often, and waits for the end."""
        print(json.dumps([name, count]), file=self._process.stdin, flush=True)
        self._read()

    def _read(self) -> dict[str, Any]:
        for line in self._process.stdout or ():
            if line.startswith("{"):  # libraries print other things
                found = json.loads(line)
                if "failed" in found:
                    raise Failed(found["failed"])
                return found
        raise Failed(f"{' '.join(self._process.args[4:])} ended with exit code {self._process.wait()}")


def say(**what: Any) -> None:
    """A line of JSON to whoever started this process."""
    print(json.dumps(what), flush=True)


def serve(runs: dict[str, Callable[[int], Any]]) -> None:
    """Runs what each line asks for: `[name, how often]`."""
    for line in sys.stdin:
        name, count = json.loads(line)
        runs[name](count)
        say(done=name)


def end_with_parent() -> None:
    """Linux kills this process once the one that started it is gone, however it ended: the GPU is free again."""
    ctypes.CDLL(None).prctl(_PARENT_DEATH, signal.SIGKILL)
