"""Several processes run what one does: the chain of commands, an error, a signal and a death."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from hgdpo_jax.run.files import file_hash
from hgdpo_jax.run.folder import stage_config
from hgdpo_jax.training import metrics
from hgdpo_jax.training.finished import finished_policy
from hgdpo_jax.training.policy import load_trainable, policy_of
from tests import tiny
from tests.processes.start import Ended, Started, run
from tests.rounding import NETWORK, assert_close

STAGE = ("--config", "configs/stage1.py:portraits")
MESHES = {
    "all, sharded": (2, ["--config.train.params=all", "--config.mesh.data=1", "--config.mesh.fsdp=-1"]),
    "tensor, reference cached": (1, ["--config.mesh.tensor=2", "--config.train.reference_cache=2"]),
}
RATE, STEPS = 1e-3, 2


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return inputs(tmp_path_factory.mktemp("inputs"))


def inputs(folder: Path, train: int = 7, heldout: int = 3) -> list[str]:
    """Writes those of a tiny run; returns its settings, as a user types them."""
    photographs = tiny.write_photographs(folder / "photographs", train, heldout)
    values = {
        "model.base": tiny.write_base(folder / "base"),
        "pairs.scorer": tiny.write_scorer(folder / "scorer"),
        "evaluate.scorer": "",
        "adapter.weights": "",
        "data.photographs": photographs,
        "data.resolutions": "32x32",
        "pairs.pool_size": 2,
        "pairs.steps": 2,
        "pairs.batch": 4,
        "pairs.shard_size": 4,
        "evaluate.steps": 2,
        "evaluate.batch": 4,
        "evaluate.images_per_prompt": 2,
        "train.batch": 4,
        "train.steps": STEPS,
        "train.lr": RATE,
        "train.warmup": 0,
        "train.lora_rank": 2,
        "train.log_every": 1,
        "train.checkpoint_every": 1,
    }
    return [f"--config.{key}={value}" for key, value in values.items()]


def test_the_chain_of_commands_gives_what_one_process_gives(settings: list[str], tmp_path: Path) -> None:
    """Two processes of two devices each, and one of two: but for the steps each has the programs of its own devices."""
    for name, count in (("two", 2), ("one", 1)):
        workdir, logs = str(tmp_path / name), tmp_path / f"{name}.logs"
        run(logs, count, 2, "pairs", *STAGE, "--workdir", workdir, *settings)
        if count == 2:
            run(logs, count, 2, "main", *STAGE, "--workdir", workdir, *settings)
        else:  # so that pictures are compared, not what rounding makes of two trainings
            (tmp_path / name / "stage1" / "policy").parent.mkdir(exist_ok=True)
            for part in ("policy", "reference", "config.json", "logs"):
                (tmp_path / name / "stage1" / part).symlink_to(tmp_path / "two" / "stage1" / part)
        drawn = ("--prompt", "a woman", "--samples", "5", "--steps", "2", "--batch", "2", "--out", f"{workdir}/images")
        run(logs, count, 2, "sample", "--workdir", workdir, "--size", "32x32", *drawn)
        run(logs, count, 2, "evaluate", *STAGE, "--workdir", workdir, *settings)
    run(tmp_path / "export", 2, 2, "export", "--workdir", f"{tmp_path}/two", "--out", f"{tmp_path}/export/two")
    one, two = tmp_path / "one", tmp_path / "two"
    shards = [path.name for path in (two / "stage1" / "pairs").iterdir()]
    assert len(shards) == 4 + 2 * 3 and not any("groups" in name for name in shards)
    for name in shards:
        assert file_hash(one / "stage1" / "pairs" / name) == file_hash(two / "stage1" / "pairs" / name)
    for path in (two / "images").glob("*_*.png"):
        a, b = (np.asarray(Image.open(folder / "images" / path.name), np.int16) for folder in (one, two))
        assert np.abs(a - b).max() <= 2
    assert (one / "results.json").read_text() == (two / "results.json").read_text()
    assert (tmp_path / "export" / "two" / "unet" / "config.json").is_file()
    lines = (two / "stage1" / "logs" / "metrics.jsonl").read_text().splitlines()
    steps = [line["step"] for line in map(json.loads, lines) if "loss/total" in line]
    assert steps == list(range(1, STEPS + 1))  # each once
    values = in_tensorboard(two / "stage1" / "logs")
    assert len(values) == len(set(values)) and [step for name, step in values if name == "loss/total"] == steps
    shutil.copytree(two / "stage1" / "pairs", tmp_path / "four" / "stage1" / "pairs")
    run(tmp_path / "four.logs", 1, 4, "main", *STAGE, "--workdir", f"{tmp_path}/four", *settings)
    compare(tmp_path / "four", two)


def in_tensorboard(logs: Path) -> list[tuple[str, int]]:
    """(name, step) of each value in the one file of events, all of whose records are whole."""
    (path,) = logs.glob("events.out.tfevents.*")
    content, found = path.read_bytes(), []
    while content:
        end = 12 + int.from_bytes(content[:8], "little")
        for checked, crc in ((content[:8], content[8:12]), (content[12:end], content[end : end + 4])):
            assert masked_crc32c(checked) == int.from_bytes(crc, "little")
        event = Event.FromString(content[12:end])
        found += [(value.tag, event.step) for value in event.summary.value]
        content = content[end + 4 :]
    return found


def compare(one: Path, two: Path) -> None:
    """Two trainings that differ by rounding.

    The same batches and the same noise: errors differ by rounding from the first step on, where other noise would
    make another error. After each step of Adam at rate r a parameter has moved by at most about r, in whatever
    direction rounding chooses where its gradient is nearly nothing: two runs end at most 2 r steps apart, and mostly
    far nearer.
    """
    logs = [metrics.read(workdir / "stage1" / "logs") for workdir in (one, two)]
    for a, b in zip(*logs, strict=True):
        for key in [key for key in a if key.startswith("error/")]:
            np.testing.assert_allclose(a[key], b[key], rtol=1e-5)
    config = stage_config(one, "stage1")
    like = policy_of(load_trainable(config, tiny.mesh()), config)
    ends = [jax.tree.leaves(finished_policy(workdir, "stage1", like, config)) for workdir in (one, two)]
    apart = np.concatenate([np.abs(a - b).ravel() for a, b in zip(*ends, strict=True)])
    moved = np.concatenate([np.abs(a - b).ravel() for a, b in zip(ends[0], jax.tree.leaves(like), strict=True)])
    assert apart.max() <= 2.1 * RATE * STEPS and moved.max() > 0.5 * RATE
    assert np.median(apart) < 0.01 * np.median(moved[moved > 0])


@pytest.mark.parametrize("mesh", MESHES)
def test_a_training_is_that_of_one_process_on_whatever_mesh(mesh: str, settings: list[str], tmp_path: Path) -> None:
    devices, own = MESHES[mesh]
    for name in ("two", "one"):
        tiny.write_pairs(tmp_path / name / "stage1" / "pairs", train=6, heldout=4)
    arguments = ("main", *STAGE, *settings, *own, f"--config.train.checkpoint_every={STEPS}")
    run(tmp_path / "logs", 2, devices, *arguments, "--workdir", f"{tmp_path}/two")
    run(tmp_path / "logs", 1, 2 * devices, *arguments, "--workdir", f"{tmp_path}/one")
    compare(tmp_path / "one", tmp_path / "two")
    predicted = sorted((tmp_path / "one" / "stage1").glob("reference_cache/*.npy"))
    assert len(predicted) == 2 * ("cached" in mesh)
    for path in predicted:
        assert_close(np.load(tmp_path / "two" / path.relative_to(tmp_path / "one")), np.load(path), NETWORK)


def train(settings: list[str], folder: Path, **own: list[str]) -> Started:
    """Two processes that train for long."""
    tiny.write_pairs(folder / "run" / "stage1" / "pairs", train=6, heldout=4)
    arguments = ["main", *STAGE, "--workdir", f"{folder}/run", *settings, "--config.train.steps=100000"]
    of_each = {int(index.removeprefix("of_")): more for index, more in own.items()}
    return Started(folder / "logs", 2, 1, *arguments, own=of_each)


def last_line(process: Ended) -> str:
    return process.errors.strip().splitlines()[-1]


def test_a_signal_to_one_stops_all_at_one_step(settings: list[str], tmp_path: Path) -> None:
    started = train([*settings, "--config.train.checkpoint_every=100000"], tmp_path)
    started.wait_for(tmp_path / "run" / "stage1" / "logs" / "metrics.jsonl")
    started.processes[1].send_signal(signal.SIGTERM)
    ended = started.ended()
    assert [process.code for process in ended] == [75, 75]
    for process in ended:
        assert last_line(process) == "stopped; the same command goes on from what is finished"
    (step,) = [path for path in (tmp_path / "run" / "stage1" / "policy").iterdir() if path.name.isdecimal()]
    logged = metrics.read(tmp_path / "run" / "stage1" / "logs")
    assert logged[-1]["step"] == int(step.name)  # nothing is lost


def test_a_dead_process_ends_the_other_with_a_line(settings: list[str], tmp_path: Path) -> None:
    started = train(settings, tmp_path)
    started.wait_for(tmp_path / "run" / "stage1" / "policy" / "1.sha256.json")
    started.processes[1].kill()
    rest, _ = started.ended(60)
    assert rest.code == 75 and rest.after <= 60
    assert "process 1 on " in last_line(rest) and "no sign of life for 15 s: all stop" in last_line(rest)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (["--config.train.lr=0.5"], "its --config.train.lr is 0.5, that of process 0 on .* is 0.001"),
        (["--workdir", "elsewhere"], "elsewhere: process 1 on .* does not see the folder that process 0 sees"),
        (["--config.train.learning=1"], "config key train.learning: unknown"),
    ],
)
def test_an_error_at_one_is_the_same_line_at_all(
    own: list[str], message: str, settings: list[str], tmp_path: Path
) -> None:
    own = [str(tmp_path / argument) if argument == "elsewhere" else argument for argument in own]
    ended = train(settings, tmp_path, of_1=own).ended(100)
    assert [process.code for process in ended] == [1, 1]
    lines = {last_line(process) for process in ended}
    assert len(lines) == 1
    assert re.search(message, lines.pop())
    assert not (tmp_path / "run" / "stage1" / "policy").exists()
    assert not (tmp_path / "elsewhere" / "stage1").exists()


@pytest.mark.parametrize("command", ["main", "sample", "export"])
def test_help_needs_no_other_process(command: str) -> None:
    environment = {"HGDPO_DISTRIBUTED": "1", "JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "2"}
    asked = [sys.executable, "-m", f"hgdpo_jax.{command}", "--help"]
    env = os.environ | environment | {"JAX_PROCESS_ID": "1"}
    assert "usage:" in subprocess.run(asked, env=env, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.mark.parametrize("index", ["0", "1"])
def test_who_comes_names_that_not_all_do(index: str) -> None:
    """JAX aborts it, in C++; ours is the last word."""
    program = "from hgdpo_jax.devices.start import start; from hgdpo_jax.run import command, lifecycle; "
    program += "lifecycle._START = 3; command.run(start)"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {"HGDPO_DISTRIBUTED": "1", "JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
    env = os.environ | environment | {"JAX_PROCESS_ID": index, "PYTHONPATH": os.getcwd()}
    ended = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 1
    line = (
        f"error: process {index} on .*: not all 2 processes came to localhost:{port} within 3 s; those that do not say"
    )
    assert re.match(line, ended.stderr.strip().splitlines()[-1])


@pytest.mark.parametrize("mistaken", [0, 1])
def test_a_mistake_at_one_ends_another_that_is_busy_with_the_same_line(mistaken: int, tmp_path: Path) -> None:
    """What it does in Python keeps it from hearing of it at once; process 0's service has to wait for that."""
    program = f"""
import time, jax
from hgdpo_jax.run import lifecycle
lifecycle.start()
if jax.process_index() == {mistaken}:
    time.sleep(1)
    lifecycle.end_all("error: a mistake", 1)
while True:
    jax.make_jaxpr(lambda x: sum(x + i for i in range(3000)))(0)
"""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {"HGDPO_DISTRIBUTED": "1", "JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
    started = []
    for index in "01":
        env = os.environ | environment | {"JAX_PROCESS_ID": index, "PYTHONPATH": os.getcwd()}
        started.append(subprocess.Popen([sys.executable, "-c", program], env=env, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=100)[1] for process in started]
    assert [process.returncode for process in started] == [1, 1]
    assert [error.strip().splitlines()[-1] for error in errors] == ["error: a mistake"] * 2
