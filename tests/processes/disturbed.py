"""Kills or signals one of two processes at random moments, and compares what becomes of it with an undisturbed run.

python -m tests.processes.disturbed KILL 20     in pairs, training and saving; restarted in turn by 2, 1 and 4 processes
python -m tests.processes.disturbed TERM 10     in training, after the first line of the log

A moment is one after all have met: who does not come at all is waited for, five minutes.
"""

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import jax  # noqa: I001
import numpy as np

import tests.conftest  # noqa: F401  # the environment of the tests
from hgdpo_jax.run.files import file_hash
from hgdpo_jax.run.folder import stage_config
from hgdpo_jax.training.checkpoints import Checkpoints
from hgdpo_jax.training.finished import finished_policy
from hgdpo_jax.training.policy import load_trainable, policy_of
from tests import tiny
from tests.patience import patience
from tests.processes.start import Started
from tests.processes.test_processes import RATE, STAGE

STEPS, RESTARTED_BY = 40, (2, 1, 4)
# What is there once a command is under way.
BEGUN = {"pairs": "run/stage1/pairs/.lock", "main": "run/stage1/.lock"}
FIRST_LINE = "run/stage1/logs/metrics.jsonl"


def start(folder: Path, count: int, command: str, settings: list[str]) -> Started:
    return Started(folder / "logs", count, 1, [command, *STAGE, "--workdir", f"{folder}/run", *settings])


def undisturbed(folder: Path, count: int, command: str, settings: list[str]) -> None:
    """Runs a command to its end."""
    for ended in start(folder, count, command, settings).ended():
        assert ended.code == 0, ended.errors


def length(folder: Path, command: str, settings: list[str]) -> float:
    """Runs a command to its end; returns how many seconds it took once it was under way."""
    started = start(folder, 2, command, settings)
    started.wait_for(folder / BEGUN[command])
    begin = time.monotonic()
    for ended in started.ended():
        assert ended.code == 0, ended.errors
    return time.monotonic() - begin


def parameters(folder: Path) -> np.ndarray:
    config = stage_config(folder / "run", "stage1")
    like = policy_of(load_trainable(config, tiny.mesh()), config)
    return np.concatenate(
        [np.ravel(x) for x in jax.tree.leaves(finished_policy(folder / "run", "stage1", like, config))]
    )


def main() -> None:
    kind, count, seed = sys.argv[1], int(sys.argv[2]), int((sys.argv[3:] or ["0"])[0])
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        own = {"train.steps": STEPS, "train.lr": RATE, "train.checkpoint_every": 4}
        settings = tiny.settings(root / "inputs", train=7, heldout=3, **own)
        lengths = {command: length(root / "undisturbed", command, settings) for command in BEGUN}
        pairs, wanted = root / "undisturbed" / "run" / "stage1" / "pairs", parameters(root / "undisturbed")
        print(f"undisturbed: {lengths}", flush=True)
        for number in range(count):
            folder, who, by = root / str(number), chance.randrange(2), RESTARTED_BY[number % 3]
            command = "main" if kind == "TERM" or chance.random() < 0.6 else "pairs"
            if command == "main":
                shutil.copytree(pairs, folder / "run" / "stage1" / "pairs")
            started = start(folder, 2, command, settings)
            started.wait_for(folder / (FIRST_LINE if kind == "TERM" else BEGUN[command]))
            after = chance.uniform(0, lengths[command] if kind == "KILL" else 3.0)
            time.sleep(after)
            if any(process.poll() is not None for process in started.processes):
                after = float("nan")  # too late, it had finished
            started.processes[who].send_signal(getattr(signal, f"SIG{kind}"))
            ended = started.ended(25)
            codes, seconds = [process.code for process in ended], max(process.after for process in ended)
            assert seconds <= patience(15), seconds
            assert kind == "KILL" or codes in ([75, 75], [0, 0]), codes
            words = {(process.errors.strip().splitlines() or [""])[-1][:90] for process in ended if process.code > 0}
            stood = Checkpoints(folder / "run" / "stage1").latest() if command == "main" else None
            undisturbed(folder, by, command, settings)
            if command == "main":
                apart = np.abs(parameters(folder) - wanted).max()
                assert apart <= 2.1 * RATE * STEPS, apart
                found = f"at most {apart:.1e} apart"
            else:
                for path in pairs.iterdir():
                    assert file_hash(path) == file_hash(folder / "run" / "stage1" / "pairs" / path.name), path
                found = "the same bytes"
            print(f"{number}: {kind} to process {who} {after:.1f} s into {command}: {codes} after {seconds:.0f} s",
                  f"{words or ''}, step {stood}; restarted by {by}: {found}", flush=True)  # fmt: skip


if __name__ == "__main__":
    os.chdir(Path(__file__).parents[2])
    main()
