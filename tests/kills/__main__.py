"""Kills every process of a run at random moments, starts it again, and compares the end with an undisturbed run's.

python -m tests.kills [MOMENTS=50] [SEED=0]

For one and for two processes: pairs, training, export and evaluation, each killed in turn. Of a command's moments half
are spread over all of it, half over the part in which it writes. Once a command has come to its end its results are
compared: the same names, the same bytes of shards, weights, exported files and measures, and each step logged once.
"""

import json
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np  # noqa: I001
import tensorstore as ts

import tests.conftest  # noqa: F401  # the environment of the tests
from hgdpo_jax.run.files import file_hash
from hgdpo_jax.training import metrics
from tests import tiny
from tests.kills.processes import Started
from tests.processes.test_processes import STAGE, in_tensorboard

STEPS = 12
# A command, and what is there once it writes.
COMMANDS = {
    "pairs": "run/stage1/pairs/.lock",
    "main": "run/stage1/.lock",
    "export": "export/.lock",
    "evaluate": "run/evaluation/.lock",
}
_PASSED_OVER = ("said.", "content.json", "events.out.tfevents.")  # with times of day


def start(folder: Path, count: int, command: str, settings: list[str]) -> Started:
    """Starts a command with its results in `folder`."""
    own = [*STAGE, *settings]
    if command == "export":
        own = ["--out", f"{folder}/export", "--format", "diffusers,peft,kohya"]
    return Started(folder / "said", count, [command, "--workdir", f"{folder}/run", *own])


def seconds(folder: Path, count: int, command: str, settings: list[str]) -> list[float]:
    """Runs a command to its end; how long that took, and how long from when it began to write."""
    begin = time.monotonic()
    started = start(folder, count, command, settings)
    started.wait_for(folder / COMMANDS[command])
    wrote = time.monotonic()
    started.end()
    return [time.monotonic() - begin, time.monotonic() - wrote]


def found(folder: Path) -> dict[str, Any]:
    """Name → content of what a command has written, of which times of day and speeds are left out."""
    contents: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name, parts = str(path.relative_to(folder)), path.relative_to(folder).parts
        if path.name.startswith(_PASSED_OVER) or {"policy", "reference"} & {*parts}:  # these two follow
            continue
        if path.suffix == ".npz":
            contents[name] = {key: (str(x.dtype), x.shape, x.tobytes()) for key, x in np.load(path).items()}
        elif path.name == "metrics.jsonl":
            logged = [json.loads(line) for line in path.read_text().splitlines()]
            contents[name] = [{key: x for key, x in line.items() if not key.startswith("speed/")} for line in logged]
        else:
            contents[name] = file_hash(path)
    for state in (*folder.glob("run/*/policy/*/state"), *folder.glob("run/*/reference/weights")):
        contents[str(state.relative_to(folder))] = arrays(state)
    for meta in folder.glob("run/*/policy/*/meta/metadata"):
        contents[str(meta.relative_to(folder))] = meta.read_text()
    for kept in folder.glob("run/*/policy"):
        contents[str(kept.relative_to(folder))] = sorted(entry.name for entry in kept.iterdir())
    return contents


def arrays(folder: Path) -> dict[str, bytes]:
    """Name → bytes of the arrays in a folder of Orbax's."""
    store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}}
    keys = [key.decode() for key in ts.KvStore.open(store).result().list().result()]
    names = {key.removesuffix("/.zarray") for key in keys if key.endswith("/.zarray")}
    opened = {name: ts.open({"driver": "zarr", "kvstore": store | {"path": f"{name}/"}}) for name in sorted(names)}
    return {name: array.result().read().result().tobytes() for name, array in opened.items()}


def compare(folder: Path, wanted: dict[str, Any]) -> None:
    """Raises AssertionError where a run is not as the undisturbed one, or its log says a step twice."""
    got = found(folder)
    assert got.keys() == wanted.keys(), sorted(got.keys() ^ wanted.keys())
    different = [name for name in wanted if got[name] != wanted[name]]
    assert not different, different
    for logs in folder.glob("run/*/logs"):
        lines = [json.loads(line) for line in (logs / "metrics.jsonl").read_text().splitlines()]
        steps = [line["step"] for line in lines if "loss/total" in line]
        assert steps == list(range(1, STEPS + 1)), steps
        assert len(metrics.read(logs)) == STEPS + 1  # and the look before the first
        values = in_tensorboard(logs)
        assert len(values) == len(set(values))
        assert sorted(step for name, step in values if name == "loss/total") == steps


def disturb(root: Path, count: int, command: str, settings: list[str], moments: int, chance: random.Random) -> None:
    """Kills one command at so many moments, and compares each time that it came to its end."""
    wanted = root / "undisturbed"
    shutil.copytree(wanted, root / f"before_{command}")
    lengths = seconds(wanted, count, command, settings)
    results, kills, ends = found(wanted), 0, 0
    while kills < moments:
        folder, fresh = root / f"{command}_{ends}", True
        shutil.copytree(root / f"before_{command}", folder)
        while kills < moments:
            late = kills % 2
            after = lengths[late] * (kills + chance.random()) / moments
            started = start(folder, count, command, settings)
            if late:
                started.wait_for(folder / COMMANDS[command])
            if (took := started.lasts(after)) is not None:  # it has come to its end before
                lengths = [took if fresh and i == late else length for i, length in enumerate(lengths)]
                break
            started.kill()
            kills, fresh = kills + 1, False
            print(f"  {command}, {count} processes: killed {after:.2f} s after its", "writing" if late else "start",
                  flush=True)  # fmt: skip
        start(folder, count, command, settings).end()  # where it had ended, it finds all done
        compare(folder, results)
        ends += 1
        shutil.rmtree(folder)
    print(f"{command}, {count} processes: {lengths[0]:.1f} s, {lengths[1]:.1f} s of them writing; {kills} kills, "
          f"{ends} ends, the same each time", flush=True)  # fmt: skip


def main() -> None:
    moments, seed = (int(text) for text in [*sys.argv[1:], *("50", "0")[len(sys.argv) - 1 :]])
    chance = random.Random(seed)
    shares = [moments // 8 + (i < moments % 8) for i in range(8)]
    with tempfile.TemporaryDirectory() as place:
        own = {"train.steps": STEPS, "train.checkpoint_every": 3, "train.lr": 1e-3, "pairs.shard_size": 3}
        settings = tiny.settings(Path(place) / "inputs", train=9, heldout=4, **own)
        for count in (1, 2):
            root = Path(place) / str(count)
            (root / "undisturbed").mkdir(parents=True)
            for command in COMMANDS:
                disturb(root, count, command, settings, shares.pop(0), chance)


if __name__ == "__main__":
    os.chdir(Path(__file__).parents[2])
    main()
