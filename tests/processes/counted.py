"""Counts, for 2, 4, 8 and 16 processes, what each sends to JAX's service and what it reads until it begins.

python -m tests.processes.counted [2 4 8 16]

`pairs` is run on a folder whose pairs are finished, `main` trains a few steps. None of the columns may grow with the
number of processes, but for JAX's own that wait for the next. The watch's messages grow with time, hence their rate.
What XLA's collectives say to the service to find each other, from C++, is not seen here, nor what is read by mmap.
"""

import atexit
import collections
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tests.conftest  # noqa: F401  # the environment of the tests
from tests import tiny
from tests.processes import start
from tests.processes.test_processes import STAGE

# On two cores sixteen processes take minutes to start, and do not answer for long.
COUNTING = start.COMMANDS.replace(
    "command.run(main)",
    "lifecycle._DEAD = 300.0\nfrom tests.processes import counted\ncounted.count()\ncommand.run(main)",
)
BEGINS = {
    "main": ("hgdpo_jax.training.loop", "warn_of_hours"),
    "pairs": ("hgdpo_jax.curriculum.build", "winners_of"),
}
METHODS = ("blocking_key_value_get", "blocking_key_value_get_bytes", "key_value_try_get", "key_value_set")
METHODS += ("key_value_set_bytes", "key_value_dir_get", "key_value_delete", "key_value_increment", "wait_at_barrier")
METHODS += ("get_live_nodes",)


def count() -> None:
    """In a process that is counted: from now on its calls are, and at its end they are written down."""
    from importlib import import_module

    from jax._src.lib import _jax

    found: dict[str, Any] = {"calls": collections.Counter()}
    begin, client = time.monotonic(), _jax.DistributedRuntimeClient

    def counted(name: str, call: Callable) -> Callable:
        def wrapped(self: Any, key: str = "", *arguments: Any, **named: Any) -> Any:
            ours = "ours" if str(key).startswith("hgdpo/") else "theirs"
            who = "watch" if threading.current_thread().name == "hgdpo processes" else ours
            found["calls"][f"{who} {'barrier' if name == 'wait_at_barrier' else 'message'}"] += 1
            found.setdefault("names", collections.Counter())[f"{who} {name} {str(key)[:60]}"] += 1
            return call(self, key, *arguments, **named)

        return wrapped

    for name in METHODS:
        if hasattr(client, name):
            setattr(client, name, counted(name, getattr(client, name)))
    imported = _read()

    def begins() -> None:
        if "read" not in found:
            found["read"] = {key: value - imported[key] for key, value in _read().items()}

    module, name = BEGINS[sys.argv[1]]
    work = getattr(import_module(module), name)

    def worked(*arguments: Any, **named: Any) -> Any:
        begins()
        return work(*arguments, **named)

    setattr(import_module(module), name, worked)

    def write() -> None:
        begins()  # where there was nothing to do
        found["seconds"] = time.monotonic() - begin
        Path(os.environ["COUNTED"], f"{os.environ['JAX_PROCESS_ID']}.json").write_text(json.dumps(found))

    atexit.register(write)


def _read() -> dict[str, int]:
    """Bytes that this process has read since it began: all that it asked for, and what came from a disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return {key: int(value) for key, value in (line.split(": ") for line in lines) if key in ("rchar", "read_bytes")}


def main() -> None:
    counts = [int(text) for text in sys.argv[1:]] or [2, 4, 8, 16]
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # what is in it would be read, and what is not would not
    print("| | processes | our messages | our barriers | others' messages | others' barriers | watch a second "
          "| MB read, process 0 | MB read, others | from the disk | seconds |", flush=True)  # fmt: skip
    print("|" + "---|" * 11, flush=True)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        own = {"train.batch": 16, "train.steps": 3}
        settings = tiny.settings(root / "inputs", train=16, heldout=16, **own)
        start.run(root / "pairs", 1, 1, ["pairs", *STAGE, "--workdir", f"{root}/run", *settings])
        for command in BEGINS:
            for number in counts:
                print(_row(root, command, number, settings), flush=True)


def _row(root: Path, command: str, number: int, settings: list[str]) -> str:
    """A line of the table; where processes differ, from the least to the most."""
    folder, pairs = root / f"{command} {number}", root / "run" / "stage1" / "pairs"
    folder.mkdir()
    os.environ["COUNTED"] = str(folder)
    workdir = folder / "run"
    (workdir / "stage1").mkdir(parents=True)
    (workdir / "stage1" / "pairs").symlink_to(pairs)
    arguments = [command, *STAGE, "--workdir", f"{workdir}", *settings]
    started = start.Started(folder / "logs", number, 1, arguments, program=COUNTING)
    for process in started.ended(450):
        assert process.code == 0, process.errors
    found = [json.loads((folder / f"{index}.json").read_text()) for index in range(number)]
    if os.environ.get("NAMES"):
        print(*(f"{n} {name}" for name, n in found[1]["names"].items()), sep="\n")

    def span(values: list[float], form: str = ".0f") -> str:
        least, most = format(min(values), form), format(max(values), form)
        return least if least == most else f"{least}–{most}"

    kinds = ("ours message", "ours barrier", "theirs message", "theirs barrier")
    cells = [command, str(number)] + [span([one["calls"].get(kind, 0) for one in found]) for kind in kinds]
    cells.append(span([one["calls"].get("watch message", 0) / one["seconds"] for one in found], ".1f"))
    cells += [span([one["read"]["rchar"] / 1e6 for one in part], ".2f") for part in (found[:1], found[1:])]
    cells.append(span([one["read"]["read_bytes"] / 1e6 for one in found], ".2f"))
    cells.append(span([one["seconds"] for one in found]))
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    os.chdir(Path(__file__).parents[2])
    main()
