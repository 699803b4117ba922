"""Kills or signals one of two processes at random moments, and compares what becomes of it with an undisturbed run.

python -m tests.processes.disturbed KILL 20     in pairs, training and saving; restarted in turn by 2, 1 and 4 processes
python -m tests.processes.disturbed TERM 10     after the first line of the log
"""

import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import jax  # noqa: I001
import numpy as np

import tests.conftest  # noqa: F401  # the environment of the tests
from hgdpo_jax.files import file_hash
from hgdpo_jax.training import policy as policies
from hgdpo_jax.training.checkpoints import Checkpoints
from tests import tiny
from tests.processes.start import Started
from tests.processes.test_processes import RATE, STAGE, inputs

STEPS, RESTARTED_BY = 40, (2, 1, 4)


def finish(folder: Path, count: int, settings: list[str]) -> None:
    """Both commands, to their end."""
    for command in ("pairs", "main"):
        for ended in Started(
            folder / "logs", count, 1, command, *STAGE, "--workdir", f"{folder}/run", *settings
        ).ended():
            assert ended.code == 0, ended.errors


def parameters(folder: Path) -> np.ndarray:
    config = policies.stage_config(folder / "run", "stage1")
    like = policies.of(policies.load(config, tiny.mesh()), config)
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(policies.finished(folder / "run", "stage1", like))])


def disturb(folder: Path, kind: str, after: float, who: int, settings: list[str]) -> tuple[str, list[int], float]:
    """(what was under way, exit codes, seconds until the rest had ended), and prints the rest's last words."""
    begin = time.monotonic()
    for command in ("pairs", "main"):
        started = Started(folder / "logs", 2, 1, command, *STAGE, "--workdir", f"{folder}/run", *settings)
        if kind == "TERM" and command == "main":
            started.wait_for(folder / "run" / "stage1" / "logs" / "metrics.jsonl")
            begin = time.monotonic()
        while any(process.poll() is None for process in started.processes):
            if time.monotonic() - begin > after and (kind == "KILL" or command == "main"):
                started.processes[who].send_signal(getattr(signal, f"SIG{kind}"))
                ended = started.ended(100)
                for process in ended:
                    print(f"  {process.code}: {(process.errors.strip().splitlines() or [''])[-1][:150]}")
                    assert kind == "TERM" or process.code != 0
                return command, [process.code for process in ended], max(process.after for process in ended)
            time.sleep(0.01)
    return "nothing", [], 0.0


def main() -> None:
    kind, count, seed = sys.argv[1], int(sys.argv[2]), int((sys.argv[3:] or ["0"])[0])
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        settings = inputs(root / "inputs") + [f"--config.train.steps={STEPS}", "--config.train.checkpoint_every=4"]
        begin = time.monotonic()
        finish(root / "undisturbed", 2, settings)
        length, wanted = time.monotonic() - begin, parameters(root / "undisturbed")
        print(f"undisturbed: {length:.0f} s", flush=True)
        for number in range(count):
            folder, who = root / str(number), chance.randrange(2)
            folder.mkdir()
            after = chance.uniform(0, length if kind == "KILL" else 4.0)
            under_way, codes, ended = disturb(folder, kind, after, who, settings)
            stood = Checkpoints(folder / "run" / "stage1").latest() if under_way == "main" else None
            by = RESTARTED_BY[number % 3]
            finish(folder, by, settings)
            apart = np.abs(parameters(folder) - wanted).max()
            for path in (root / "undisturbed" / "run" / "stage1" / "pairs").iterdir():
                assert file_hash(path) == file_hash(folder / "run" / "stage1" / "pairs" / path.name), path
            assert apart <= 2.1 * RATE * STEPS, apart
            assert ended <= 60 and (kind == "KILL" or not codes or codes == [75, 75]), (codes, ended)
            print(f"{number}: {kind} to process {who} after {after:.1f} s of {under_way}: codes {codes}, ended in "
                  f"{ended:.0f} s, step {stood}; restarted by {by}: at most {apart:.1e} apart", flush=True)  # fmt: skip


if __name__ == "__main__":
    os.chdir(Path(__file__).parents[2])
    main()
