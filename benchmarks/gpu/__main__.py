"""Runs the parts of benchmarks/on_gpu.sh that have no result yet, each within its time, and writes each at once.

python -m benchmarks.gpu [OUT] [--small] [--seconds 570]
"""

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import COMPILING, PARTS
from benchmarks.gpu.results import Results
from hgdpo_jax.run.errors import UserError

Said = queue.Queue[dict[str, Any]]
LOG = "log.txt"
_STARTING = 120.0  # seconds for JAX to find the device


class Stopped(Exception):
    """By a signal, or because the time is up; its exit code."""


@contextmanager
def worker(parts: list[str], is_small: bool, log: Path) -> Iterator[Said]:
    """What a worker says, and {} once it has ended. Killed at the end of the block."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu.worker", *parts]
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # diffusers needs memory too
    if is_small:  # whose speed tells nothing
        command += ["--small"]
        flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        environment["XLA_FLAGS"] = f"{flags} {environment.get('XLA_FLAGS', '')}"
    said: Said = queue.Queue()
    with log.open("a") as errors:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            start_new_session=True,  # a signal to all is no fault of the part that is being measured
        )

    def read() -> None:
        for line in process.stdout or ():
            if line.startswith("{"):
                said.put(json.loads(line))
        said.put({})

    threading.Thread(target=read, daemon=True).start()
    try:
        yield said
    finally:
        process.kill()
        process.wait()


class Run:
    """Measures what has no result yet.

    Args:
        results: of the folder.
        seconds: after which it stops.
    """

    def __init__(self, results: Results, seconds: float) -> None:
        self._results, self._begun = results, time.monotonic()
        self._until = self._begun + seconds
        self._tried: set[str] = set()

    def measure(self) -> None:
        """Runs workers until each part that is left was tried, those that failed in an earlier run last. A part that
        hangs or ends its worker is left out by the next.

        Raises:
            Stopped: the time is up.
            UserError: there is no GPU, or another than before.
        """
        again = {*self._results.failed}
        for parts in ([name for name in PARTS if name not in again], [name for name in PARTS if name in again]):
            while left := [name for name in parts if name in self._results.left() and name not in self._tried]:
                with worker(left, self._results.is_small, self._results.folder / LOG) as said:
                    self._follow(said, left)

    def _follow(self, said: Said, left: list[str]) -> None:
        """Writes down what a worker says, until it ends or takes too long for what it does."""
        doing, limit, parts, ready = "starting", _STARTING, left, set[str]()
        while (line := self._next(said, limit)) and "end" not in line:
            if "refused" in line:
                raise UserError(line["refused"])
            if "about" in line:
                self._results.set_about(line["about"])
            elif "begin" in line:
                doing, limit, parts = line["begin"], line["limit"], line["parts"]
                self._note(doing)
            elif "ready" in line:
                ready.add(line["ready"])
                self._note(f"{line['ready']}: ready in {line['seconds']} s")
            elif "result" in line:
                self._tried.add(line["part"])
                self._results.add(line["part"], line["result"])
            elif "failed" in line:
                self._fail(line["part"], line["failed"])
        if not line or "end" not in line:
            why = f"took longer than {limit:g} s" if line is None else f"the process ended, see {LOG}"
            lacking = [name for name in parts if {*map(str, PARTS[name].programs)} - ready]
            for name in (lacking if doing == COMPILING else []) or parts:
                if name not in self._tried:  # whose worker then ended by itself
                    self._fail(name, why if doing == name else f"{doing}: {why}")

    def _next(self, said: Said, limit: float) -> dict[str, Any] | None:
        """The next line; {} where the worker has ended, None where it takes longer than it may."""
        try:
            return said.get(timeout=max(0.0, min(limit, self._until - time.monotonic())))
        except queue.Empty:
            if time.monotonic() >= self._until:
                raise Stopped(1) from None
            return None

    def _fail(self, part: str, why: str) -> None:
        self._tried.add(part)
        self._results.fail(part, why)
        self._note(f"{part}: {why}")

    def _note(self, text: str) -> None:
        print(f"{time.monotonic() - self._begun:5.0f} s  {text}", file=sys.stderr, flush=True)


def _stop(number: int, _: object) -> None:
    raise Stopped(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="on_gpu.sh", description="Measures steps, pools, attention and memory on a GPU."
    )
    parser.add_argument("out", nargs="?", type=Path, default=Path("runs/on_gpu"), help="folder of the results")
    parser.add_argument("--small", action="store_true", help="tiny networks, on whatever device is here: tries it out")
    parser.add_argument("--seconds", type=float, default=570.0, help="after which it stops; default 570")
    given = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _stop)
    given.out.mkdir(parents=True, exist_ok=True)
    code = 0
    try:
        results = Results.read(given.out, given.small)
        Run(results, given.seconds).measure()
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except Stopped as stopped:
        code = int(stopped.args[0])
        print(
            f"stopped; {len(results.left())} of {len(PARTS)} parts are left: the same command goes on", file=sys.stderr
        )
    print(results.summary())
    return code or (1 if results.lacking() else 0)


if __name__ == "__main__":
    sys.exit(main())
