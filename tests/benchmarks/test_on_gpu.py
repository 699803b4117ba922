"""benchmarks/on_gpu.sh without a GPU: what it does with what its workers say, and when it is stopped."""

import json
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import __main__ as on_gpu
from benchmarks.gpu.measure import KINDS
from benchmarks.gpu.parts import COMPILING, PARTS, PLANNED, WAVES, Step
from benchmarks.gpu.results import Results
from hgdpo_jax.run.errors import UserError

ROOT = Path(__file__).parents[2]
ABOUT = {"device": "NVIDIA H100 80GB HBM3", "cores": 16, "versions": {"jax": "0.11.2"}}
Line = dict[str, Any]


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> tuple[list[list[Line]], list[list[str]]]:
    """(what each worker is to say, which parts each was given)."""
    said: list[list[Line]] = []
    given: list[list[str]] = []

    @contextmanager
    def worker(parts: list[str], is_small: bool, log: Path) -> Iterator[queue.Queue[Line]]:
        given.append(parts)
        lines: queue.Queue[Line] = queue.Queue()
        for line in [{"about": ABOUT}, *said.pop(0)]:
            lines.put(line)
        yield lines

    monkeypatch.setattr(on_gpu, "worker", worker)
    return said, given


def begin(*parts: str, doing: str = "", limit: float = 5.0) -> Line:
    return {"begin": doing or parts[0], "limit": limit, "parts": [*parts]}


def step(name: str, seconds: float) -> Line:
    """A result of a step of four pairs."""
    (program, *_) = PARTS[name].programs
    memory = {"arguments": 2**31, "temporaries": 2**32, "temporaries_measured": None}
    of = {"pairs": 4, "dtype": "bfloat16", "operations": 20e12, "compile_seconds": 60.0}
    found = {"seconds": {str(program): {"median": seconds, "lowest": seconds, "highest": seconds}}, "memory": memory}
    return {"part": name, "result": found | {key: {str(program): x} for key, x in of.items()} | {"gradient_norm": 1.0}}


def test_each_part_is_given_up_by_itself_and_the_rest_goes_on(
    workers: tuple[list[list[Line]], list[list[str]]], tmp_path: Path
) -> None:
    said, given = workers
    products, attention, four, sixteen, *others = PARTS
    peak = {"part": products, "result": {"operations_per_second": {"bfloat16": 800e12}}}
    ready = [{"ready": str(program), "seconds": 1.0} for program in PARTS[four].programs]
    compiles = begin(attention, four, *others, doing=COMPILING, limit=0.01)
    said += [
        [peak, begin(sixteen, limit=0.01)],  # hangs in a part
        [compiles, *ready],  # hangs in a program: what needs no other goes on
        [step(four, 0.1), begin(attention), {}],  # ends in a part
    ]
    on_gpu.Run(Results.read(tmp_path, False), 60).measure()
    assert given == [[*PARTS], [attention, four, *others], [attention, four]]

    written = json.loads((tmp_path / "results.json").read_text())
    assert [*written["parts"]] == [products, four]
    assert written["failed"].keys() == {attention, sixteen, *others}
    assert written["failed"][sixteen] == "took longer than 0.01 s"
    assert written["failed"]["deterministic"] == "compiling: took longer than 0.01 s"
    assert "the process ended" in written["failed"][attention]
    summary = (tmp_path / "summary.md").read_text()
    assert "| 100 ms | 100 ms to 100 ms | 40.0 | 200 | 25.0% |" in summary
    assert f"- {sixteen}: took longer" in summary


def test_a_later_run_tries_what_failed_after_all_else(
    workers: tuple[list[list[Line]], list[list[str]]], tmp_path: Path
) -> None:
    said, given = workers
    products, attention, four, sixteen, *others = PARTS
    Results(tmp_path, False, ABOUT, {name: {} for name in (attention, *others)}, {four: "before"}).write()
    said += [
        [{"part": products, "failed": "left out: No module named diffusers"}, step(sixteen, 1.0), {"end": True}],
        [{"part": four, "failed": "again"}, {"end": True}],
    ]
    results = Results.read(tmp_path, False)
    on_gpu.Run(results, 60).measure()
    assert given == [[products, sixteen], [four]]
    assert results.failed[four] == "again" and results.lacking() == [four]  # for lack of a package none is expected


def test_when_the_time_is_up_what_was_measured_stays(
    workers: tuple[list[list[Line]], list[list[str]]], tmp_path: Path
) -> None:
    said, _ = workers
    name = "step: sd15, bfloat16, 4 pairs"
    said += [[step(name, 0.1), begin("products")]]
    with pytest.raises(on_gpu.Stopped):
        on_gpu.Run(Results.read(tmp_path, False), 0.2).measure()
    assert [*Results.read(tmp_path, False).parts] == [name]


def test_results_of_another_device_or_size_are_left_alone(
    workers: tuple[list[list[Line]], list[list[str]]], tmp_path: Path
) -> None:
    said, _ = workers
    Results(tmp_path, False, ABOUT | {"device": "NVIDIA A10"}, {"products": {}}).write()
    before = (tmp_path / "results.json").read_bytes()
    said += [[]]
    with pytest.raises(UserError, match="NVIDIA A10.*NVIDIA H100.*another folder"):
        on_gpu.Run(Results.read(tmp_path, False), 60).measure()
    with pytest.raises(UserError, match="without --small"):
        Results.read(tmp_path, True)
    assert (tmp_path / "results.json").read_bytes() == before
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        Results.read(tmp_path, False)


def test_the_parts_are_of_known_kinds_and_share_programs() -> None:
    names = [part.name for wave in WAVES for part in wave]
    assert len(names) == len(PARTS) and {part.kind for part in PARTS.values()} == {*KINDS}
    measured = {part.programs[0] for part in PARTS.values() if part.kind == "steps"}
    wanted = {Step(pairs, dtype) for pairs in (1, 4, 8, 16) for dtype in ("bfloat16", "float16")}
    assert wanted | {*PLANNED} <= measured
    half = [part.name for wave in WAVES[:3] for part in wave]
    assert {"products", "attention", "plan", "deterministic"} < {*half}


def test_a_signal_ends_it_and_its_worker_with_a_summary(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", str(tmp_path / "out"), "--small"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    started = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "out" / "log.txt"
    while not log.exists():  # which the worker's start opens
        assert started.poll() is None
        time.sleep(0.05)
    time.sleep(0.2)
    started.send_signal(signal.SIGTERM)
    out, errors = started.communicate(timeout=60)
    assert started.returncode == 128 + signal.SIGTERM
    assert f"{len(PARTS)} of {len(PARTS)} parts are left" in errors and "Without a result" in out
    assert str(log) not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
