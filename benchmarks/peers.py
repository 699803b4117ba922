"""Two programs that do the same work, each in a process of its own, timed alternately.

A benchmark calls :func:`alternately`, which starts the benchmark once more for each program, with its own arguments and
`--only NAME`; there it calls :func:`serve`.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any


def serve(run: Callable[[], Any]) -> None:
    """Runs once for each line that comes in, and says how many seconds it took."""
    for _ in sys.stdin:
        begin = time.perf_counter()
        run()
        print(time.perf_counter() - begin, flush=True)


def alternately(module: str, names: Iterable[str], rounds: int) -> dict[str, list[float]]:
    """The seconds that each of the programs took in each round; a first one, which compiles, does not count.

    Raises:
        ValueError: a program ended.
    """
    command = [sys.executable, "-W", "ignore", "-m", module, *sys.argv[1:], "--only"]
    started = {
        name: subprocess.Popen([*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        for name in names
    }
    seconds: dict[str, list[float]] = {name: [] for name in started}
    for number in range(rounds + 1):
        for name, process in started.items():
            process.stdin.write("\n")
            found = float(process.stdout.readline())
            if number:
                seconds[name].append(found)
    for process in started.values():
        process.stdin.close()
        process.wait()
    return seconds


def summary(values: Iterable[float], digits: int) -> dict[str, float]:
    """Median and range."""
    ordered = sorted(values)
    found = {"median": statistics.median(ordered), "lowest": ordered[0], "highest": ordered[-1]}
    return {name: round(value, digits) for name, value in found.items()}
