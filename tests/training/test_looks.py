"""What looks at held-out pairs bring: which checkpoints stay and are taken, what stops a training, pictures."""

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hgdpo_jax.pictures.sheet import GAP
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.training import metrics
from hgdpo_jax.training.checkpoints import Checkpoints, tree_hash
from hgdpo_jax.training.finished import finished_policy
from hgdpo_jax.training.loop import train
from hgdpo_jax.training.metrics import FACES
from hgdpo_jax.training.monitor import Monitor
from hgdpo_jax.training.policy import load_trainable, policy_of
from hgdpo_jax.training.step import TrainState
from hgdpo_jax.training.watchdog import Collapse, reasons, watch
from tests import tiny

EVALUATE = Monitor.evaluate
LOSS = "heldout/loss/dpo"
GOOD = {LOSS: 0.69, "heldout/error/winner": 0.2, "heldout/error/winner_reference": 0.2, "heldout/dpo/margin": 1.0}
GOOD[FACES] = 1.0


def looks(monkeypatch: pytest.MonkeyPatch, losses: Mapping[int, float]) -> None:
    """Lets the looks of a training find these held-out losses."""

    def evaluate(monitor: Monitor, state: TrainState, step: int) -> None:
        monitor.log.write({LOSS: losses[step]}, step)

    monkeypatch.setattr(Monitor, "evaluate", evaluate)


@pytest.mark.parametrize(
    ("last", "why"),
    [
        ({}, ""),
        ({LOSS: 1.85}, ""),  # less than three times the lowest, 0.62
        ({LOSS: 1.87}, "held-out loss rose from 0.62 to 1.87"),
        ({"heldout/error/winner": 0.29}, ""),
        ({"heldout/error/winner": 0.31}, "winner's error is 1.55 times"),
        ({"heldout/dpo/margin": 99.0}, ""),
        ({"heldout/dpo/margin": -101.0}, "margin is -101"),
        ({FACES: 0.5}, ""),
        ({FACES: 0.375}, "faces are found in 38% of the pictures, at first in 100%"),
    ],
)
def test_a_look_gives_an_alarm(last: dict[str, float], why: str) -> None:
    found = reasons([GOOD, GOOD | {LOSS: 0.62}, GOOD | {LOSS: 0.7} | last])
    assert why in found and bool(found) == bool(why)


def test_a_base_that_draws_no_faces_is_not_told_to() -> None:
    assert not reasons([GOOD | {FACES: 0.25}, GOOD | {FACES: 0.0}])


def test_only_alarms_in_a_row_count() -> None:
    bad = GOOD | {LOSS: 3.0}
    log = [GOOD | {"step": 0}, bad | {"step": 1}, {"step": 2.0, "loss/dpo": 9.0}, bad | {"step": 3}]
    assert watch(log).good == 0 and [step for step, _ in watch(log).alarms] == [1, 3]
    assert watch([*log, GOOD | {"step": 4}]) == (4, [])
    assert watch([]) == (None, [])


def test_a_training_that_collapses_goes_back_to_its_last_good_checkpoint(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Which newer ones have not pushed out; it then goes on from there, also beyond what stopped it."""
    tiny.write_pairs(tmp_path / "stage1" / "pairs")
    config = tiny.config(base, steps=6)
    config.train.checkpoint_every = config.train.eval_every = config.train.keep = 1
    looks(monkeypatch, {0: 0.69, 1: 0.6, 2: 0.7, 3: 2.0, 4: 2.0, 5: 2.0, 6: 2.0})
    with pytest.raises(Collapse, match=r"step 5: the held-out loss rose from 0.6 to 2; 3 looks in a row .* step 3\. "
                       r"The training goes back to its checkpoint of step 2; .*--resume-with") as stopped:  # fmt: skip
        train(config, tmp_path)
    assert stopped.value.code == 3
    alarms = [message for message in caplog.messages if "alarm" in message]
    assert [message[:7] for message in alarms] == ["step 3:", "step 4:"]
    assert alarms[0].endswith("the held-out loss rose from 0.6 to 2; that is alarm 1 of 3 in a row, after which "
                              "training stops")  # fmt: skip
    assert Checkpoints(tmp_path / "stage1").steps() == [1, 2]  # the best, and the last good one
    config.train.alarms = 0
    train(config, tmp_path)
    assert Checkpoints(tmp_path / "stage1").steps() == [1, 2, 6]


def test_newest_multiples_and_the_best_stay_and_each_can_be_taken(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write_pairs(tmp_path / "stage1" / "pairs")
    config = tiny.config(base, steps=8)
    config.train.checkpoint_every = config.train.eval_every = 1
    config.train.keep, config.train.keep_every = 2, 5
    looks(monkeypatch, dict.fromkeys(range(9), 0.69) | {3: 0.5})
    train(config, tmp_path)
    checkpoints = Checkpoints(tmp_path / "stage1")
    assert checkpoints.steps() == [3, 5, 7, 8]
    assert [checkpoints.find(which) for which in ("latest", "best", "5", "6")] == [8, 3, 5, None]
    like = policy_of(load_trainable(config, tiny.mesh()), config)

    def policy(step: str | None = None) -> str:
        return tree_hash(finished_policy(tmp_path, "stage1", like, config, step))

    assert policy() == policy("latest") == policy("8") != policy("best") == policy("3") != policy("5")
    with pytest.raises(UserError, match=r"--step 6: stage1 has no such checkpoint in .*; there are: 3, 5, 7, 8"):
        policy("6")
    config.train.hand_on = "best"
    train(config, tmp_path)  # finished: it notes the setting
    assert policy() == policy("3")
    config.train.steps = 9
    looks(monkeypatch, {9: 0.69})
    monkeypatch.setattr(metrics.MetricLog, "means", lambda log: (_ for _ in ()).throw(UserError("stops here")))
    with pytest.raises(UserError, match="stops here"):
        train(config, tmp_path)
    with pytest.raises(UserError, match="stage1 stands at step 8 of 9"):
        policy()
    assert policy("8")


class Refused(Exception):
    """wandb.Error"""


def wandb_of(runs: list[SimpleNamespace]) -> ModuleType:
    """A module with the interface of wandb that is used, whose runs are kept."""

    def init(**given: Any) -> SimpleNamespace:
        if given["project"] == "refused":
            raise Refused("No API key\n configured.")
        lines: list[dict[str, Any]] = []
        run = SimpleNamespace(given=given, lines=lines, log=lines.append, ended=None, axes=[])
        run.define_metric = lambda name, step_metric: run.axes.append((name, step_metric))
        run.finish = lambda exit_code=0: setattr(run, "ended", exit_code)
        run.offline, run.dir, run.url = len(runs) > 0, f"{given['dir']}/wandb/offline-x/files", "https://board/x"
        runs.append(run)
        return run

    module = ModuleType("wandb")
    module.__dict__.update(init=init, Settings=dict, Error=Refused, Image=np.array)
    return module


def test_what_people_see_is_drawn_at_each_look_and_goes_to_wandb_too(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Prompts of one's own beside the base's drawings; one run of W&B, in whatever pieces the stage is trained."""
    tiny.write_pairs(tmp_path / "stage1" / "pairs")
    config, lines = tiny.config(base, steps=2), tmp_path / "prompts.txt"
    config.train.prompts = str(lines)
    monkeypatch.setattr(Monitor, "evaluate", EVALUATE)
    with pytest.raises(UserError, match=f"config key train.prompts={lines}: no such file"):
        train(config, tmp_path)
    assert not (tmp_path / "stage1" / "reference").exists()
    lines.write_text("a face\n\na house\n")
    config.train.eval_every, config.train.wandb = 2, "refused"
    runs: list[SimpleNamespace] = []
    for module, line in (
        (None, "train.wandb=refused: the package wandb is not installed; pip install wandb"),
        (ModuleType("wandb"), "the package wandb is not installed"),  # a folder of that name
        (wandb_of(runs), "train.wandb=refused: W&B says No API key configured.; run wandb login, or set WANDB_MODE="),
    ):
        monkeypatch.setitem(sys.modules, "wandb", module)
        with pytest.raises(UserError, match=re.escape(line)):
            train(config, tmp_path)
    config.train.wandb = "faces"
    train(config, tmp_path)
    (run,) = runs
    logs = tmp_path / "stage1" / "logs"
    assert run.given["group"] == tmp_path.name and run.given["config"]["model"]["dtype"] == "float32"
    assert run.axes == [("*", "step")] and run.ended == 0
    drawn = ("samples", "prompts")
    pictures = {(line["step"], name): line[name] for line in run.lines for name in drawn if name in line}
    assert list(pictures) == [(0, "samples"), (0, "prompts"), (2, "samples"), (2, "prompts")]
    for (step, name), picture in pictures.items():
        np.testing.assert_array_equal(picture, np.asarray(Image.open(logs / name / f"{step}.png")))
    scalars: dict[int, dict[str, float]] = {}
    for line in run.lines:
        if not set(drawn) & set(line):
            scalars.setdefault(line["step"], {}).update(line)
    assert list(scalars.values()) == metrics.read(logs)
    monkeypatch.setattr(Monitor, "evaluate", tiny.glance)
    monkeypatch.setattr(metrics.MetricLog, "means", lambda log: (_ for _ in ()).throw(UserError("stops here")))
    config.train.steps = 3
    with pytest.raises(UserError, match="stops here"):
        train(config, tmp_path)
    assert runs[1].given["id"] == run.given["id"] and runs[1].given["resume"] == "allow" and runs[1].ended == 1
    said = capsys.readouterr().out
    line = rf"stage1: look at step 2: held-out loss ([\d.]+), accuracy \S+, faces in \d+% of {logs}/samples/2\.png\n"
    look = re.search(line, said)
    assert look and look[1] == f"{metrics.read(logs)[-1]['heldout/loss/total']:.4g}"
    assert "stage1: W&B: https://board/x\n" in said
    assert f"stage1: W&B: offline, later: wandb sync {logs}/wandb/offline-x\n" in said
    first, last = (np.asarray(Image.open(tmp_path / "stage1" / "logs" / "prompts" / f"{n}.png")) for n in (0, 2))
    side = 2 * 32
    cells = [[x[GAP + i * (side + GAP) :][:side, -2 * (side + GAP) :] for i in (0, 1)] for x in (first, last)]
    np.testing.assert_array_equal(cells[0][0], cells[0][1])  # before the first step policy and base are the same
    np.testing.assert_array_equal(cells[0][0], cells[1][0])
    assert (cells[1][0] != cells[1][1]).any()
