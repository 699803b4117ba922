"""Starts a command as one or two processes, which begin with the libraries imported."""

import atexit
import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path

from tests.processes.start import COMMANDS

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.kills.libraries"])
_LONGEST = 1800.0  # seconds; a command takes one or two minutes at most on a busy machine


def _command(words: list[str], environment: dict[str, str], log: Path) -> None:
    """In the process: runs a command as tests of several processes do; what it says is added to a file."""
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.environ |= environment
    sys.argv = ["-c", *words]
    try:
        exec(compile(COMMANDS, "command", "exec"), {"__name__": "__main__"})
    finally:
        atexit._run_exitfuncs()  # as Python does when it ends; processes of this kind do not


class Started:
    """Processes that run.

    Args:
        log: a file for each process, begins with this path.
        count: of processes, of one device each.
        words: name of the command and its arguments.
    """

    def __init__(self, log: Path, count: int, words: list[str]) -> None:
        environment = {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")}
        if count > 1:
            with socket.socket() as free:
                free.bind(("localhost", 0))
                address = f"localhost:{free.getsockname()[1]}"
            environment |= {
                "HGDPO_DISTRIBUTED": "1",
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(count),
            }
        self._logs = [log.with_name(f"{log.name}.{index}") for index in range(count)]
        own = [environment | ({"JAX_PROCESS_ID": str(index)} if count > 1 else {}) for index in range(count)]
        arguments = [(words, mine, path) for mine, path in zip(own, self._logs, strict=True)]
        self.processes = [_CONTEXT.Process(target=_command, args=each) for each in arguments]
        for process in self.processes:
            process.start()

    def alive(self) -> bool:
        """Whether any process has not ended."""
        return any(process.is_alive() for process in self.processes)

    def wait_for(self, path: Path) -> None:
        """Until a file is there, or all have ended."""
        while not path.exists() and self.alive():
            time.sleep(0.002)

    def lasts(self, seconds: float) -> float | None:
        """Waits so long. None where a process is still alive then; otherwise after how many seconds all had ended."""
        begin = time.monotonic()
        while self.alive():
            if time.monotonic() > begin + seconds:
                return None
            time.sleep(0.002)
        return time.monotonic() - begin

    def kill(self) -> None:
        """Kills all, and waits until they are dead."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def end(self) -> None:
        """Waits for the end of all. Raises AssertionError unless it is a good one, without a traceback on the way."""
        for process, log in zip(self.processes, self._logs, strict=True):
            process.join(_LONGEST)
            said = log.read_text()
            if process.exitcode != 0 or "Traceback" in said:
                self.kill()
                raise AssertionError(f"exit code {process.exitcode}: {said}")
