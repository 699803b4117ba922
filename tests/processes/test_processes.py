"""Several processes run what one does: the chain of commands, an error, a signal and a death.

To start Python, import what a command needs and compile it takes longer than the work here. So one start does in turn
what the same processes can do, and trainings have few programs between them.
"""

import json
import re
import signal
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
from tests.processes.start import DEAD, WITHOUT_TORCH, Ended, Started, run
from tests.rounding import NETWORK, assert_close

STAGE = ("--config", "configs/stage1.py:portraits")
PAIRS = ("stage1", "stage2", "stage3", "naive")  # from a pool, reconstructions, almost photographs, photographs
RATE, STEPS = 1e-3, 2


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    values = {"train.steps": STEPS, "train.lr": RATE, "evaluate.images_per_prompt": 2}
    return tiny.settings(tmp_path_factory.mktemp("inputs"), train=7, heldout=3, **values)


def test_the_chain_of_commands_gives_what_one_process_gives(settings: list[str], tmp_path: Path) -> None:
    """Two processes of two devices each, and one of two: but for the steps each has the programs of its own devices.
    Steps are compared with those of one process of four."""
    one, two, four = (tmp_path / name for name in ("one", "two", "four"))
    sharded = ["--config.stage=sharded", "--config.train.pairs=stage1", "--config.train.params=all"]
    sharded += ["--config.mesh.data=1", "--config.mesh.fsdp=-1"]

    def build(workdir: Path) -> list[list[str]]:
        return [["pairs", "--config", f"configs/{stage}.py:portraits", *at(workdir), *settings] for stage in PAIRS]

    def train(workdir: Path) -> list[list[str]]:
        return [["main", *STAGE, *at(workdir), *settings, *own] for own in ([], sharded)]

    def draw(workdir: Path) -> list[list[str]]:
        how = ["--prompt", "a woman", "--samples", "5", "--steps", "2", "--batch", "2", "--size", "32x32"]
        sample = ["sample", *at(workdir), *how, "--out", f"{workdir}/images"]
        return [sample, ["evaluate", *STAGE, *at(workdir), *settings]]

    export = ["export", *at(two), "--out", f"{two}/export"]
    run(tmp_path / "two.logs", 2, 2, *build(two), *train(two), *draw(two), export)
    for workdir in (one, four):
        (workdir / "stage1").mkdir(parents=True)
    for part in ("policy", "reference", "config.json", "logs"):  # pictures are compared, not what rounding makes of two
        (one / "stage1" / part).symlink_to(two / "stage1" / part)  # trainings
    (four / "stage1" / "pairs").symlink_to(two / "stage1" / "pairs")
    run(tmp_path / "one.logs", 1, 2, *build(one), *draw(one))
    run(tmp_path / "four.logs", 1, 4, *train(four))

    for stage in PAIRS:
        shards = [path.name for path in (two / stage / "pairs").iterdir()]
        assert len(shards) in (6 + 2 * 2, 6 + 2 * 3) and not any("groups" in name for name in shards)
        for name in shards:
            assert file_hash(one / stage / "pairs" / name) == file_hash(two / stage / "pairs" / name)
    for path in (two / "images").glob("*_*.png"):
        a, b = (np.asarray(Image.open(folder / "images" / path.name), np.int16) for folder in (one, two))
        assert np.abs(a - b).max() <= 2
    assert (one / "results.json").read_text() == (two / "results.json").read_text()
    assert (two / "export" / "unet" / "config.json").is_file()
    lines = (two / "stage1" / "logs" / "metrics.jsonl").read_text().splitlines()
    steps = [line["step"] for line in map(json.loads, lines) if "loss/total" in line]
    assert steps == list(range(1, STEPS + 1))  # each once
    values = in_tensorboard(two / "stage1" / "logs")
    assert len(values) == len(set(values)) and [step for name, step in values if name == "loss/total"] == steps
    for stage in ("stage1", "sharded"):
        compare(four, two, stage)


def at(workdir: Path) -> list[str]:
    return ["--workdir", str(workdir)]


def in_tensorboard(logs: Path) -> list[tuple[str, int]]:
    """(name, step) of each value in the files of events, all of whose records are whole."""
    found = []
    for path in sorted(logs.glob("events.out.tfevents.*")):
        content = path.read_bytes()
        while content:
            end = 12 + int.from_bytes(content[:8], "little")
            for checked, crc in ((content[:8], content[8:12]), (content[12:end], content[end : end + 4])):
                assert masked_crc32c(checked) == int.from_bytes(crc, "little")
            event = Event.FromString(content[12:end])
            found += [(value.tag, event.step) for value in event.summary.value]
            content = content[end + 4 :]
    return found


def compare(one: Path, two: Path, stage: str = "stage1") -> None:
    """Two trainings that differ by rounding.

    The same batches and the same noise: errors differ by rounding from the first step on, where other noise would
    make another error. After each step of Adam at rate r a parameter has moved by at most about r, in whatever
    direction rounding chooses where its gradient is nearly nothing: two runs differ by at most 2 r steps at the end,
    and mostly by far less.
    """
    logs = [metrics.read(workdir / stage / "logs") for workdir in (one, two)]
    for a, b in zip(*logs, strict=True):
        for key in [key for key in a if key.startswith("error/")]:
            np.testing.assert_allclose(a[key], b[key], rtol=1e-5)
    config = stage_config(one, stage)
    like = policy_of(load_trainable(config, tiny.mesh()), config)
    ends = [jax.tree.leaves(finished_policy(workdir, stage, like, config)) for workdir in (one, two)]
    difference = np.concatenate([np.abs(a - b).ravel() for a, b in zip(*ends, strict=True)])
    moved = np.concatenate([np.abs(a - b).ravel() for a, b in zip(ends[0], jax.tree.leaves(like), strict=True)])
    assert difference.max() <= 2.1 * RATE * STEPS and moved.max() > 0.5 * RATE
    assert np.median(difference) < 0.01 * np.median(moved[moved > 0])


# Two devices split the model between them, each with all rows of a batch.
SPLIT = ["--config.mesh.tensor=2", "--config.train.reference_cache=2", "--config.train.text_cache=true"]
# A training that does not end by itself, of a program that is compiled soon.
LONG = ["--config.train.steps=100000", "--config.train.blocks=up"]


def training(settings: list[str], workdir: Path, *own: str) -> list[str]:
    """The command of a training on pairs that are there."""
    tiny.write_pairs(workdir / "stage1" / "pairs", train=6, heldout=4)
    return ["main", *STAGE, *at(workdir), *settings, *own]


def last_line(process: Ended) -> str:
    return process.errors.strip().splitlines()[-1]


def test_a_model_split_between_two_is_trained_as_by_one_and_a_signal_to_one_stops_both_at_one_step(
    settings: list[str], tmp_path: Path
) -> None:
    one, two, stopped = (tmp_path / name for name in ("one", "two", "stopped"))
    long = training(settings, stopped, *LONG, "--config.train.checkpoint_every=100000")
    started = Started(tmp_path / "two.logs", 2, 1, training(settings, two, *SPLIT), long)
    started.wait_for(stopped / "stage1" / "logs" / "metrics.jsonl")
    started.processes[1].send_signal(signal.SIGTERM)
    ended = started.ended()
    assert lines_of(ended, 75) == {"stopped; the same command goes on from what is finished"}
    (step,) = [path for path in (stopped / "stage1" / "policy").iterdir() if path.name.isdecimal()]
    assert metrics.read(stopped / "stage1" / "logs")[-1]["step"] == int(step.name)  # nothing is lost

    run(tmp_path / "one.logs", 1, 2, training(settings, one, *SPLIT))
    compare(one, two)
    predicted = sorted((one / "stage1").glob("reference_cache/*.npy"))
    assert len(predicted) == 2
    for path in predicted:
        assert_close(np.load(two / path.relative_to(one)), np.load(path), NETWORK)


def test_a_dead_process_ends_the_other_with_a_line(settings: list[str], tmp_path: Path) -> None:
    started = Started(tmp_path / "logs", 2, 1, training(settings, tmp_path / "run", *LONG))
    started.wait_for(tmp_path / "run" / "stage1" / "policy" / "1.sha256.json")
    started.processes[1].kill()
    rest, _ = started.ended()
    assert rest.code == 75
    assert "process 1 on " in last_line(rest) and f"no sign of life for {DEAD:.0f} s: all stop" in last_line(rest)


def lines_of(ended: list[Ended], code: int) -> set[str]:
    """The last lines of processes that ended with a code."""
    assert [process.code for process in ended] == [code] * len(ended)
    return {last_line(process) for process in ended}


# The programs below need but the command line, which is there faster than the commands.
PARSES = """
from hgdpo_jax.devices.start import start
from hgdpo_jax.run import command, processes
processes._VISIBLE = 3
def main():
    config, given = command.parse(command.run_parser(""))
    start(given.workdir, command.as_arguments(config))
command.run(main)
"""


def all_at_once(started: list[Started]) -> list[str]:
    """The last line of each, which is the same in all its processes. They mostly wait, so they do so together."""
    found = [lines_of(each.ended(), 1) for each in started]
    assert all(len(lines) == 1 for lines in found), found
    return [line for (line,) in found]


def test_an_error_at_one_is_the_same_line_at_all(tmp_path: Path) -> None:
    messages = {
        ("--config.train.lr=0.5",): "its --config.train.lr is 0.5, that of process 0 on .* is 0.001",
        tuple(at(tmp_path / "elsewhere")): "elsewhere: process 1 on .* does not see the folder that process 0 sees",
    }
    started = []
    for number, own in enumerate(messages):
        arguments = [*STAGE, *at(tmp_path / f"run{number}"), "--config.train.lr=0.001"]
        started.append(Started(tmp_path / f"{number}.logs", 2, 1, arguments, own={1: list(own)}, program=PARSES))
    for line, message in zip(all_at_once(started), messages.values(), strict=True):
        assert re.search(message, line)


BUSY = """
import sys, time
import jax
from hgdpo_jax.devices.start import start
from hgdpo_jax.run import command
def work():
    start()
    if jax.process_index() == int(sys.argv.pop(1)):
        time.sleep(1)
        command.parse(command.run_parser(""))
    while True:
        jax.make_jaxpr(lambda x: sum(x + i for i in range(3000)))(0)
command.run(work)
"""


def test_a_mistake_at_one_ends_another_that_is_busy_with_the_same_line(tmp_path: Path) -> None:
    """What it does in Python keeps it from hearing of it at once; process 0's service has to wait for that."""
    arguments = [*STAGE, *at(tmp_path / "run"), "--config.train.learning=1"]
    mistaken = [Started(tmp_path / index, 2, 1, [index, *arguments], program=BUSY) for index in ("0", "1")]
    for line in all_at_once(mistaken):
        assert line.startswith("error: config key train.learning: unknown")


LATE = """
from hgdpo_jax.devices.start import start
from hgdpo_jax.run import command, lifecycle
lifecycle._START = 3
command.run(start)
"""


def test_who_comes_names_that_not_all_do(tmp_path: Path) -> None:
    """JAX aborts it, in C++; ours is the last word."""
    alone = [Started(tmp_path / str(index), 2, 1, program=LATE, missing=1 - index) for index in (0, 1)]
    for index, line in enumerate(all_at_once(alone)):
        address = alone[index].address
        come = rf"error: process {index} on .*: not all 2 processes came to {address} within 3 s; those that do not"
        assert re.match(come, line)


HELP = f"""{WITHOUT_TORCH}
from importlib import import_module
from hgdpo_jax.run import command
names, sys.argv = sys.argv[1:], ["", "--help"]
for name in names:
    try:
        command.run(import_module(f"hgdpo_jax.{{name}}").main)
    except SystemExit as end:
        assert not end.code
"""


def test_help_needs_no_other_process(tmp_path: Path) -> None:
    commands = ["pairs", "main", "sample", "evaluate", "export"]
    (ended,) = Started(tmp_path / "logs", 2, 1, commands, program=HELP, missing=0).ended()
    assert ended.code == 0, ended.errors
    assert ended.out.count("usage:") == len(commands)
