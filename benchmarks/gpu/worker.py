"""Compiles the programs of a wave side by side, then measures its parts one after the other; started by `__main__`.

python -m benchmarks.gpu.worker [--small] PART …

Each line of stdout is JSON: `about`, of the device; `begin`, a part or "compiling", with the seconds that it may take
without a further line; `ready`, a program; `part` with its `result` or with why it `failed`; `end`.

One process does all that it can, so that JAX starts and traces once. Its threads share XLA's lock of the device,
without which kernels that are tried out would disturb each other.
"""

import argparse
import os
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax

from benchmarks.gpu.measure import KINDS
from benchmarks.gpu.parts import COMPILING, COMPILING_LIMIT, WAVES, Drawing, Other, Part, Program, Step
from benchmarks.gpu.processes import Failed, Process, end_with_parent, say
from benchmarks.gpu.programs import Programs
from hgdpo_jax.devices.start import start
from hgdpo_jax.devices.xla import use_precision

_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "jax-cuda13-plugin",
    "jax-cuda12-plugin",
    "nvidia-cudnn-cu13",
    "nvidia-cudnn-cu12",
)


def about() -> dict[str, Any]:
    """Device and versions."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"device": jax.devices()[0].device_kind, "cores": os.cpu_count(), "versions": found}


class Worker:
    """Attributes:
    prepared: programs that can be run.
    failed: programs that cannot → why.
    """

    def __init__(self, is_small: bool) -> None:
        self.is_small, self.programs = is_small, Programs(is_small)
        self.prepared: dict[Program, Any] = {}
        self.failed: dict[Program, str] = {}

    def prepare(self, programs: Sequence[Program]) -> None:
        """Has them all ready to run. Other processes work meanwhile; the main thread alone traces."""
        new = [each for each in programs if each not in self.prepared and each not in self.failed]
        waiting: dict[Future[float], Program] = {}
        with ThreadPoolExecutor(max(2, (os.cpu_count() or 2) // 2)) as pool:
            for program in sorted(new, key=lambda each: not isinstance(each, Other)):
                try:
                    self.prepared[program] = self._begun(program)
                    waiting[pool.submit(_finish, self.prepared[program])] = program
                except Exception as error:
                    self._fail(program, error)
            for future in as_completed(waiting):
                program = waiting[future]
                try:
                    say(ready=str(program), seconds=round(future.result(), 1))
                except Exception as error:
                    self._fail(program, error)

    def _begun(self, program: Program) -> Any:
        if isinstance(program, Step):
            return self.programs.step(program)
        if isinstance(program, Drawing):
            return self.programs.drawing(program)
        arguments = [*program.arguments, *(["--small"] if self.is_small else [])]
        own = {"JAX_PLATFORMS": "cpu"} if program.module == "planned" else {}
        kind = jax.devices()[0].device_kind
        return Process(program.module, *arguments, environment=os.environ | own | {"BENCHMARKED_DEVICE": kind})

    def _fail(self, program: Program, error: Exception) -> None:
        self.prepared.pop(program, None)
        self.failed[program] = str(error) if isinstance(error, Failed) else f"{program}: {_words(error)}"
        if not isinstance(error, Failed):
            traceback.print_exception(error)

    def measure(self, part: Part) -> None:
        """Measures a part. After an error of the device itself this process is of no use and ends."""
        missing = [self.failed[program] for program in part.programs if program in self.failed]
        if missing:
            return say(part=part.name, failed="; ".join(missing))
        say(begin=part.name, limit=part.limit, parts=[part.name])
        try:
            say(part=part.name, result=KINDS[part.kind](part, self.prepared, self.is_small))
        except Exception as error:
            say(part=part.name, failed=_words(error))
            traceback.print_exception(error)
            if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
                os._exit(1)


def _finish(prepared: Any) -> float:
    """Seconds until a program can be run."""
    begin = time.perf_counter()
    if isinstance(prepared, Process):
        prepared.prepare()
    else:
        prepared.program  # noqa: B018  # compiles
        prepared.seconds = time.perf_counter() - begin
    return time.perf_counter() - begin


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true")
    parser.add_argument("parts", nargs="+")
    given = parser.parse_args()
    end_with_parent()
    start()
    use_precision("bfloat16")
    if not given.small and jax.default_backend() != "gpu":
        return say(refused=f"JAX finds no GPU, only {jax.devices()[0].device_kind}; --small tries the script out on a "
                           "processor")  # fmt: skip
    say(about=about())
    worker = Worker(given.small)
    for wave in WAVES:
        parts = [part for part in wave if part.name in given.parts]
        if parts:
            say(begin=COMPILING, limit=COMPILING_LIMIT, parts=[part.name for part in parts])
            worker.prepare(list(dict.fromkeys(program for part in parts for program in part.programs)))
        for part in parts:
            worker.measure(part)
    say(end=True)
    os._exit(0)  # without waiting for other processes


if __name__ == "__main__":
    main()
