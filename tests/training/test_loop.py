"""The training command: kill and resume, the predecessor, and what it refuses."""

import contextlib
import gc
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hgdpo_jax.data import ratings
from hgdpo_jax.data.loader import PairLoader
from hgdpo_jax.data.pairs import open_stage
from hgdpo_jax.devices.sharding import replicated
from hgdpo_jax.devices.transfer import place
from hgdpo_jax.main import main
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import file_hash, write_json
from hgdpo_jax.run.index import Index
from hgdpo_jax.run.locks import lock
from hgdpo_jax.training import changes, loop, metrics, monitor, start
from hgdpo_jax.training import inputs as stage_inputs
from hgdpo_jax.training import step as steps
from hgdpo_jax.training.checkpoints import Checkpoints, tree_hash
from hgdpo_jax.training.finished import finished_policy, made_from
from hgdpo_jax.training.inputs import depends_on
from hgdpo_jax.training.loop import train
from hgdpo_jax.training.loss_scale import FIRST
from hgdpo_jax.training.metrics import MetricLog
from hgdpo_jax.training.monitor import UNLEARNING, Monitor
from hgdpo_jax.training.optimizer import learning_rate, make_optimizer
from hgdpo_jax.training.policy import load_trainable, policy_of
from hgdpo_jax.training.speed import Speed
from tests import tiny
from tests.patience import patience
from tests.processes.start import WITHOUT_TORCH

# Step 6 waits for the batch after its own until the process is killed.
RUN = f"""{WITHOUT_TORCH}
import time
from pathlib import Path
from tests import tiny
from hgdpo_jax.data.loader import PairLoader
from hgdpo_jax.training.loop import train
from hgdpo_jax.training.monitor import Monitor
base, workdir = map(Path, sys.argv[1:])
Monitor.evaluate = tiny.glance
batch, fetched = PairLoader.__next__, []
PairLoader.__next__ = lambda loader: (fetched.append(1), time.sleep(600 * (len(fetched) > 6)), batch(loader))[-1]
train(tiny.config(base, steps=6), workdir)
"""


EVALUATE = Monitor.evaluate
pytestmark = pytest.mark.usefixtures("glance")


class Finished(NamedTuple):
    """A workdir with stage 1 trained; in which order things were done; what was printed, warned of and traced."""

    workdir: Path
    order: list[str]
    printed: str
    warned: list[str]
    traced: list[Path]


@pytest.fixture(scope="module")
def watched(base: Path, glance: None, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Six steps, under a name that shells and other programs treat specially."""
    workdir = tmp_path_factory.mktemp("run") / "my run: {1} & ü"
    for stage in ("stage1", "stage2"):
        tiny.write_pairs(workdir / stage / "pairs")
    order: list[str] = []
    printed, warned, traced = io.StringIO(), [], []
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        for owner, name in ((Speed, "step"), (PairLoader, "__next__"), (MetricLog, "means")):
            function = getattr(owner, name)
            patch.setattr(owner, name, lambda *given, f=function, n=name: order.append(n) or f(*given))
        patch.setattr(monitor, "_LARGE", 1e3)
        patch.setattr(monitor, "CORE", 1e4 / (os.cpu_count() or 1))
        patch.setattr(monitor.logging, "warning", lambda text, *values: warned.append(text % values))
        patch.setattr(jax.profiler, "start_trace", traced.append)
        patch.setattr(jax.profiler, "stop_trace", lambda: traced.append(Path("stop")))
        train(tiny.config(base, steps=6), workdir, range(6, 9))
    return Finished(workdir, order, printed.getvalue(), warned, traced)


@pytest.fixture(scope="module")
def finished(watched: Finished) -> Path:
    return watched.workdir


def everything(workdir: Path, base: Path, step: int, stage: str = "stage1") -> str:
    """A hash of all that a checkpoint holds."""
    config = tiny.config(base)
    pipeline = load_trainable(config, tiny.mesh())
    like = steps.init_state(policy_of(pipeline, config), make_optimizer(config.train), 0.0)
    checkpoints = Checkpoints(workdir / stage)
    state = jax.device_put(like, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    return tree_hash(checkpoints.restore(step, state)) + repr(checkpoints.meta(step)["position"])


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(
    finished: Path, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Though the newest checkpoint was damaged, too: it goes on from the one before."""
    tiny.write_pairs(tmp_path / "stage1" / "pairs")
    command = [sys.executable, "-c", RUN, str(base), str(tmp_path)]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.getcwd()}, stderr=subprocess.DEVNULL)
    newest = tmp_path / "stage1" / "policy" / "4"
    try:
        deadline = time.monotonic() + patience(50)
        while not newest.with_suffix(".sha256.json").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    damage(newest)
    assert Checkpoints(tmp_path / "stage1").latest() == 2
    assert f"{newest}: incomplete or altered" in caplog.text
    train(tiny.config(base, steps=6), tmp_path)
    assert everything(tmp_path, base, 6) == everything(finished, base, 6)


def test_an_objective_with_a_state_of_its_own_goes_on_as_if_it_had_not_stopped(base: Path, tmp_path: Path) -> None:
    """SmPO takes the scores of the records; auto β keeps a running mean."""
    added = {"objective": "smpo", "auto_beta": 0.2, "safeguard": 0.9, "sft_weight": 0.5}
    found = []
    for name, counts in (("whole", (4,)), ("stopped", (2, 4))):
        tiny.write_pairs(tmp_path / name / "stage1" / "pairs")
        for count in counts:
            train(tiny.config(base, steps=count, **added), tmp_path / name)
        found.append((metrics_of(tmp_path / name), made_from(tmp_path / name, "stage1")))
    whole, stopped = found
    assert whole == stopped and whole[0]["dpo/beta"] != 5000.0
    assert whole[1]["train.objective"] == "smpo" and whole[1]["train.safeguard"] == 0.9


def metrics_of(workdir: Path) -> dict[str, float]:
    """Of the last step, but for speeds."""
    last = metrics.read(workdir / "stage1" / "logs")[-1]
    return {name: value for name, value in last.items() if not name.startswith("speed/")}


def test_the_log_says_how_fast_it_is(finished: Path) -> None:
    lines = metrics.read(finished / "stage1" / "logs")[1:]  # before the first step there was a look
    assert [line["step"] for line in lines] == [*range(1, 7)]
    assert [line["train/learning_rate"] for line in lines] == [np.float32(5e-3)] + [np.float32(1e-2)] * 5
    assert "speed/step_seconds" not in lines[0]  # it was compiled
    assert "speed/step_seconds" not in lines[5]  # it was traced
    for line in lines[1:5]:
        assert line["speed/pairs_per_second"] == pytest.approx(8 / line["speed/step_seconds"])
        assert line["speed/hours_left"] == pytest.approx((6 - line["step"]) * line["speed/step_seconds"] / 3600)
        assert line["speed/tflops_per_second"] > 0 and "speed/share_of_peak" not in line


def test_a_batch_is_fetched_while_the_step_before_is_computed_and_not_counted_before_its_own(watched: Finished) -> None:
    assert Checkpoints(watched.workdir / "stage1").meta(6)["position"] == 6 * 8
    assert watched.order == ["__next__"] + ["step", "__next__", "means"] * 6


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target, dirs_exist_ok=True)


@pytest.mark.parametrize("reference", ["start", "base"])
def test_a_stage_starts_from_its_predecessors_policy_which_is_its_reference_unless_that_is_the_base(
    finished: Path, base: Path, tmp_path: Path, reference: str
) -> None:
    _copy(finished, tmp_path)
    config = tiny.config(base, "stage2", start="stage1", reference=reference)
    inputs, checkpoints = stage_inputs.read(config, tmp_path, Index()), Checkpoints(tmp_path / "stage2")
    begin = start.start(config, tmp_path, inputs, checkpoints)
    like = policy_of(load_trainable(config, tiny.mesh()), config)
    easy = tree_hash(finished_policy(tmp_path, "stage1", like, config))
    assert tree_hash(begin.state.policy) == easy != tree_hash(like)
    expected = easy if reference == "start" else tree_hash(like)
    kept = checkpoints.restore_reference(like, begin.reference_hash)
    assert expected == begin.reference_hash == tree_hash(begin.reference) == tree_hash(kept)


def test_a_policy_keeps_its_strength_where_lora_is_scaled_otherwise(finished: Path, base: Path) -> None:
    same, twice = tiny.config(base), tiny.config(base, lora_alpha=4.0)
    like = policy_of(load_trainable(same, tiny.mesh()), same)
    own, halved = (finished_policy(finished, "stage1", like, config) for config in (same, twice))
    for (path, a), (_, b) in zip(jax.tree.leaves_with_path(own), jax.tree.leaves_with_path(halved), strict=True):
        assert np.array_equal(b, a / 2 if "lora_B" in jax.tree_util.keystr(path) else a)


def test_a_reference_with_another_hash_is_refused(finished: Path, base: Path, tmp_path: Path) -> None:
    _copy(finished, tmp_path)
    config = tiny.config(base)
    like = policy_of(load_trainable(config, tiny.mesh()), config)
    Checkpoints(tmp_path / "stage1").save_reference(jax.tree.map(lambda x: x + 1, like))
    with pytest.raises(UserError, match="its hash .* is not .* that of the checkpoint's reference"):
        train(tiny.config(base, steps=8), tmp_path)


def test_a_stage_before_its_predecessor_is_refused(base: Path, finished: Path, tmp_path: Path) -> None:
    tiny.write_pairs(tmp_path / "stage2" / "pairs")
    with pytest.raises(UserError, match=r"stage1 was not trained in .*; run first: .*configs/stage1.py"):
        train(tiny.config(base, "stage2", start="stage1"), tmp_path)
    _copy(finished, tmp_path)
    shutil.rmtree(tmp_path / "stage1" / "policy" / "6")
    with pytest.raises(UserError, match="stage1 stands at step 4 of 6"):
        train(tiny.config(base, "stage2", start="stage1"), tmp_path)


def test_another_config_does_not_go_on(finished: Path, base: Path) -> None:
    before = file_hash(finished / "stage1" / "config.json")
    line = (
        "config key train.lr=0.5: the checkpoint in .*stage1 was made with 0.01; use that, .* by --resume-with train.lr"
    )
    with pytest.raises(UserError, match=line):
        train(tiny.config(base, steps=8, lr=0.5), finished)
    assert file_hash(finished / "stage1" / "config.json") == before


def test_pairs_that_were_rated_since_do_not_go_on(finished: Path, base: Path, tmp_path: Path) -> None:
    """Nor is a finished stage taken for one of the pairs as they are rated now."""
    _copy(finished, tmp_path / "run")
    pairs = open_stage(tmp_path / "run", "stage1")
    for better, refused in (("winner", False), ("loser", True), ("neither", True)):
        write_json(pairs.folder / ratings.NAME, ratings.kept(ratings.Ratings({"train0-0": better}), pairs.hash))
        if refused:
            with pytest.raises(UserError, match="content of the pairs=sha256 .*: the checkpoint in .* was made with"):
                train(tiny.config(base, steps=6), tmp_path / "run")
        else:
            train(tiny.config(base, steps=6), tmp_path / "run")


def test_nan_stops_and_keeps_the_last_good_checkpoint(
    finished: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _copy(finished, tmp_path)
    batch = PairLoader.__next__
    infinite = np.full((8, *tiny.LATENT), np.inf, np.float16)
    monkeypatch.setattr(PairLoader, "__next__", lambda loader: batch(loader) | {"winner": infinite})
    config = tiny.config(base, steps=8)
    with pytest.raises(UserError, match=r"loss/\w+ is (nan|inf) at step 7: training stopped"):
        train(config, tmp_path)
    assert Checkpoints(tmp_path / "stage1").latest() == 6
    assert everything(tmp_path, base, 6) == everything(finished, base, 6)


def test_the_advice_after_nan_can_be_followed_and_is_recorded(
    finished: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    _copy(finished, tmp_path)
    calmer = {"lr": 1e-3, "beta": 9000.0, "clip_norm": 0.0, "schedule": "cosine"}
    before = (tmp_path / "stage1" / "config.json").read_bytes()
    with pytest.raises(UserError, match="config key train.schedule='cosine': .* or go on with it by --resume-with"):
        train(tiny.config(base, steps=8, **calmer), tmp_path, may_change=["train.lr", "train.beta"])
    assert (tmp_path / "stage1" / "config.json").read_bytes() == before
    named = changes.changeable("train.lr,train.beta,train.clip_norm,train.schedule")
    train(tiny.config(base, steps=8, **calmer), tmp_path, may_change=named)
    said = capsys.readouterr().out
    assert "stage1: goes on from step 6\n" in said and "stage1: goes on with train.lr=0.001, which was 0.01\n" in said
    meta = Checkpoints(tmp_path / "stage1").meta(8)
    (change,) = meta["changes"]
    assert change["step"] == 6 and change["train.beta"] == [5000.0, 9000.0] and change["train.lr"] == [0.01, 0.001]
    rates = [line["train/learning_rate"] for line in metrics.read(tmp_path / "stage1" / "logs") if line["step"] > 6]
    assert rates == [pytest.approx(learning_rate(tiny.config(base, steps=8, **calmer).train, step)) for step in (6, 7)]
    train(tiny.config(base, steps=8, **calmer), tmp_path, may_change=named)  # the same command again
    with pytest.raises(UserError, match="--resume-with train.lr: stage1 stands at step 8 of 8, there is none to go on"):
        train(tiny.config(base, steps=8, **calmer | {"lr": 1e-4}), tmp_path, may_change=["train.lr"])


def test_the_command_hands_on_what_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[Any] = []
    monkeypatch.setattr(loop, "train", lambda *given: handed.extend(given))
    monkeypatch.setattr("hgdpo_jax.devices.start.start", lambda *given, **_: handed.append(given[1]["--resume-with"]))
    command = ["main", "--config", "configs/stage1.py:portraits", "--workdir", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [*command, "--resume-with", "train.lr,--config.train.beta"])
    main()
    assert handed[0] == handed[-1] == ("train.lr", "train.beta")


@pytest.mark.parametrize("text", ["train.ema", "train.lr,seed", "", "train.lr,", "train.batch", "lr"])
def test_what_would_be_another_training_does_not_change_on_the_way(text: str) -> None:
    with pytest.raises(UserError, match=f"argument --resume-with {text}: expects some of model.dtype,train.beta,"):
        changes.changeable(text)


def test_settings_that_may_change_are_those_that_are_named_and_what_comes_with_them() -> None:
    found = {"train.lr": 1.0, "train.schedule": "constant", "model.dtype": "float16", "content of x": "a"}
    wanted = found | {"train.schedule": "cosine", "train.steps": 9}
    assert changes.changes(found, wanted, ["train.schedule"], "x") == {
        "train.schedule": ["constant", "cosine"],
        "train.steps": [20_000, 9],
    }
    assert changes.changes(found, found | {"train.adam": [0.9, 0.999]}, [], "x") == {}  # a setting that is new
    for other in ({"content of x": "b"}, {"train.ema": 0.5}, {"model.dtype": "bfloat16"}, {"train.steps": 9}):
        with pytest.raises(UserError, match=next(iter(other))):
            changes.changes(found, found | other, ["train.lr", "train.schedule"], "x")


def test_what_is_refused_leaves_no_reference_and_no_config(base: Path, tmp_path: Path) -> None:
    tiny.write_pairs(tmp_path / "stage1" / "pairs")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="argument --profile 9:12: the steps to go are 1 to 4"):
        train(tiny.config(base), tmp_path, range(9, 12))
    wrong = tiny.config(base)
    wrong.data.resolutions = ("64x64",)
    with pytest.raises(UserError, match="were built for 32x32"):
        train(wrong, tmp_path)
    left = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")} - {p.relative_to(tmp_path) for p in before}
    assert left <= {Path("content.json"), Path("stage1/policy")}


@pytest.mark.parametrize("part", ["policy", "ema", "optimizer"])
def test_a_state_that_is_not_finite_is_not_saved(tmp_path: Path, part: str) -> None:
    good = {name: {"x": jnp.ones(3)} for name in ("policy", "ema", "optimizer")}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, good, {})
    checkpoints.wait()
    with pytest.raises(UserError, match=f"{part}.x is NaN or infinite after step 2: training stopped, the last good"):
        checkpoints.save(2, good | {part: {"x": jnp.array([1.0, np.inf, 1.0])}}, {})
    assert Checkpoints(tmp_path).latest() == 1


def test_large_arrays_alone_are_cut_to_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of what each of eight devices holds, a part each, for which programs are compiled."""
    everywhere = jax.sharding.NamedSharding(tiny.mesh(8, 1, 1), jax.sharding.PartitionSpec())
    for step, size in ((1, 1_999_992), (2, 2_000_000)):  # of float32
        state = {"x": jax.device_put(jnp.arange(size, dtype=jnp.float32), everywhere)}
        caplog.clear()
        with Checkpoints(tmp_path) as checkpoints, jax.log_compiles():
            checkpoints.save(step, state, {})
        assert ("jit(slice)" in caplog.text) is (step == 2)
        assert tree_hash(Checkpoints(tmp_path).restore(step, state)) == tree_hash(state)


def damage(folder: Path) -> None:
    """Flips a bit in the largest file."""
    data = max((f for f in Path(folder).rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)


def damage_when_written(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that keeps other bytes of a step than it was given."""
    finish = Checkpoints._finish

    def damaged(checkpoints: Checkpoints, now: int, held: Any) -> None:
        checkpoints._orbax.wait_until_finished()
        if now == step:
            damage(checkpoints.folder / "policy" / str(step) / "state" / "d")
        finish(checkpoints, now, held)

    monkeypatch.setattr(Checkpoints, "_finish", damaged)


def test_what_reads_otherwise_than_it_was_written_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"x": jnp.ones(3)}, {})
    damage_when_written(2, monkeypatch)
    checkpoints.save(2, {"x": jnp.arange(1000)}, {})
    with pytest.raises(UserError, match="policy/2/state: was written, but"):
        checkpoints.wait()
    assert Checkpoints(tmp_path).latest() == 1


def test_what_goes_wrong_in_the_background_ends_the_training_with_its_line(
    finished: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _copy(finished, tmp_path)
    damage_when_written(8, monkeypatch)
    check, steps = Checkpoints.check, []

    def checked(checkpoints: Checkpoints) -> None:
        """As a step that takes longer than the background."""
        steps.append(checkpoints)
        while checkpoints._saving is not None and not checkpoints._saving.done():
            time.sleep(0.01)
        check(checkpoints)

    monkeypatch.setattr(Checkpoints, "check", checked)
    with pytest.raises(UserError, match="policy/8/state: was written, but"):
        train(tiny.config(base, steps=12), tmp_path)
    assert len(steps) == 3  # before the steps 7, 8 and 9
    assert Checkpoints(tmp_path / "stage1").latest() == 6
    assert everything(tmp_path, base, 6) == everything(finished, base, 6)


def test_clip_norm_0_is_no_clipping(base: Path) -> None:
    policy, gradient = {"x": jnp.ones(3)}, {"x": jnp.full(3, 100.0 * FIRST)}
    updates = []
    for norm in (0.0, 1e6, 1e-6):
        tx = make_optimizer(tiny.config(base, clip_norm=norm, warmup=0).train)
        moments = tx.update(gradient, tx.init(policy), policy, least_scale=np.inf)[1]
        updates.append(np.asarray(optax.tree.get(moments, "mu")))
    assert np.array_equal(updates[0], updates[1])  # a norm that nothing reaches
    assert abs(updates[0]).min() > 1e6 * abs(updates[2]).max()


def test_a_policy_that_unlearns_the_winners_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    monitor = object.__new__(Monitor)
    monitor._worst, monitor.log = UNLEARNING, Mock()
    for step, error in ((1, 0.105), (2, 0.13), (3, 0.131), (4, 0.4)):
        monitor.report({"error/winner": error, "error/winner_reference": 0.1}, step)
    assert [record.getMessage()[:6] for record in caplog.records] == ["step 2", "step 4"]
    assert f"train again in another workdir with {changes.CALMER}" in caplog.text


def test_steps_that_were_raised_and_lowered_again_leave_the_stage_finished(
    finished: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _copy(finished, tmp_path)
    with monkeypatch.context() as killed:
        killed.setattr(loop, "_run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(tiny.config(base, steps=9), tmp_path)
    config = tiny.config(base, steps=6)
    like = policy_of(load_trainable(config, tiny.mesh()), config)
    with pytest.raises(UserError, match="stage1 stands at step 6 of 9"):
        finished_policy(tmp_path, "stage1", like, config)
    train(config, tmp_path)
    finished_policy(tmp_path, "stage1", like, config)


def test_a_base_may_move_but_not_change(finished: Path, base: Path, tmp_path: Path) -> None:
    _copy(finished, tmp_path / "run")
    _copy(base, tmp_path / "moved")
    train(tiny.config(tmp_path / "moved", steps=6), tmp_path / "run")
    scheduler = tmp_path / "moved" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace('"epsilon"', '"v_prediction"'))
    line = r"content of model.base=sha256 \w{12}…: the checkpoint in .* was made with sha256 \w{12}…; use that, or"
    with pytest.raises(UserError, match=line):
        train(tiny.config(tmp_path / "moved", steps=6), tmp_path / "run")
    with pytest.raises(UserError, match="content of model.base=.* stage1 in .* was made with .*; use that base"):
        train(tiny.config(tmp_path / "moved", "stage2", start="stage1", steps=2), tmp_path / "run")


def test_what_a_stage_depends_on_is_all_of_its_training_but_what_only_rounds_and_when_files_are_written(
    base: Path,
) -> None:
    config = tiny.config(base, reference_cache=1)
    aside = {"pairs", "steps", "accumulate", "checkpointing", "checkpoint_every", "checkpoints", "log_every"}
    aside |= {"keep", "keep_every", "hand_on", "alarms", "prompts", "wandb"}
    found = set(depends_on(config))
    aside |= {"eval_every", "text_cache"}
    of_flows = {"noise_levels", "noise_shift"}
    assert {f"train.{name}" for name in config.train} - found == {f"train.{name}" for name in aside | of_flows}
    assert found - {f"train.{name}" for name in config.train} == {"stage", "seed", "model.dtype"}
    config.train.schedule = "cosine"
    assert set(depends_on(config)) - found == {"train.steps"}
    config.train.noise_shift = 3.0
    assert set(depends_on(config)) - found == {"train.steps", "train.noise_levels", "train.noise_shift"}


def test_a_reference_that_changed_is_no_result(
    finished: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also under `python -O`, which leaves assertions out."""
    _copy(finished, tmp_path)
    monkeypatch.setattr(loop, "tree_hash", lambda _: "another")
    with pytest.raises(RuntimeError, match="the reference changed during training"):
        train(tiny.config(base, steps=8), tmp_path)
    assert Checkpoints(tmp_path / "stage1").latest() == 6


def test_reading_a_run_writes_nothing_and_closes_what_it_opened(
    finished: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def files() -> list[tuple[Path, int]]:
        return sorted((path, path.stat().st_mtime_ns) for path in finished.rglob("*"))

    begun, ended = [], []
    begin, end = Checkpoints.__init__, Checkpoints.close
    monkeypatch.setattr(Checkpoints, "__init__", lambda found, *given: begun.append(found) or begin(found, *given))
    monkeypatch.setattr(Checkpoints, "close", lambda found: ended.append(found) or end(found))
    config = tiny.config(base, steps=6)
    like, before = policy_of(load_trainable(config, tiny.mesh()), config), files()
    finished_policy(finished, "stage1", like, config)
    made_from(finished, "stage1")
    with Checkpoints(tmp_path / "nothing" / "stage1") as checkpoints:
        assert checkpoints.latest() is None
    assert files() == before and not list(tmp_path.iterdir())
    assert len(begun) == 3 and begun == ended
    checkpoints.close()  # once more


def test_one_command_at_a_time_trains_a_stage(finished: Path, base: Path) -> None:
    with lock(finished / "stage1"), pytest.raises(UserError, match="stage1: is being written by .* wait until that"):
        train(tiny.config(base, steps=8), finished)


def test_the_checkpoint_comes_before_the_pictures_which_a_resumed_run_makes_up_for(
    finished: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    _copy(finished, tmp_path)
    with monkeypatch.context() as killed:
        killed.setattr(Monitor, "evaluate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(tiny.config(base, steps=8), tmp_path)
    assert Checkpoints(tmp_path / "stage1").latest() == 8 and not metrics.was_evaluated(tmp_path / "stage1" / "logs", 8)
    made: list[int] = []

    def evaluate(monitor: Monitor, state: steps.TrainState, step: int) -> None:
        made.append(step)
        EVALUATE(monitor, state, step)
        monitor._print_noise(state.policy)

    monkeypatch.setattr(Monitor, "evaluate", evaluate)
    for _ in range(2):
        train(tiny.config(base, steps=8), tmp_path)
    assert made == [8] and metrics.was_evaluated(tmp_path / "stage1" / "logs", 8)
    noise = re.search(r"rounding in float32 and a step of 0.01 .* by ([\d.e-]+):", capsys.readouterr().out)
    assert 0.0 < float(noise[1]) < 100.0


def test_noise_is_that_of_all_margins_however_few_a_batch_has(capsys: pytest.CaptureFixture) -> None:
    found = object.__new__(Monitor)
    found._stage, found._dtype, found._rate, found._held = "stage1", "bfloat16", 0.0, [None] * 20
    found._measured = lambda policy, reference, i: {"dpo/margin": 3.0 * (-1) ** i, "dpo/margin_deviation": 4.0}
    found._sampler = SimpleNamespace(mesh=tiny.mesh())
    found._print_noise({"x": place(jnp.ones(1), replicated(tiny.mesh()))})
    assert "rounding in bfloat16 and a step of 0 in a random direction move margins by 5:" in capsys.readouterr().out


def test_a_step_that_was_never_whole_takes_no_place_of_one_that_is(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(step, {"x": jnp.full(3, float(step))}, {})
        if step in (2, 3):  # killed before it was hashed
            (tmp_path / "policy" / f"{step}.sha256.json").unlink()
    assert sorted(path.name for path in (tmp_path / "policy").iterdir()) == ["1", "1.sha256.json", "4", "4.sha256.json"]


def test_a_resumed_state_is_restored_into_nothing(
    finished: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device that a training fills, there is no room for a second state."""
    _copy(finished, tmp_path)
    live: list[int] = []

    def count() -> None:
        gc.collect()
        live.append(sum(x.nbytes for x in jax.live_arrays()))

    restore = Checkpoints.restore

    def counted(self: Checkpoints, step: int, like: Any) -> Any:
        count()
        found = restore(self, step, like)
        count()
        live.append(sum(x.nbytes for x in jax.tree.leaves(found)))
        return found

    monkeypatch.setattr(Checkpoints, "restore", counted)
    monkeypatch.setattr(loop, "_run", lambda *_: None)
    train(tiny.config(base, steps=8), tmp_path)
    before, after, size = live
    assert after - before == size


def test_it_says_where_it_runs_what_it_trains_and_how_long_a_processor_takes_for_a_large_model(
    watched: Finished,
) -> None:
    assert "stage1: cpu, 8 x cpu, mesh data 8 x fsdp 1 x tensor 1, 8 pairs a step" in watched.printed
    assert "stage1: trains lora, 1,024 of 415,128 parameters" in watched.printed
    parameters = [line.split()[1:] for line in watched.printed.splitlines() if line.endswith(("trained", "frozen"))]
    assert ["unet.down_blocks", "256", "float32", "trained"] in parameters
    assert sum(int(count.replace(",", "")) for _, count, *_ in parameters) == 415_128
    batch = "winner float16 [8, 4, 4, 8], loser float16 [8, 4, 4, 8], input_ids int32 [8, 77]"
    assert f"stage1: 24 pairs, in batches of {batch}" in watched.printed
    assert watched.printed.count("the peak of cpu in float32 is unknown") == 1
    (warned,) = [line for line in watched.warned if "is trained on a processor: 6 steps will take about" in line]
    assert float(warned.split("about ")[1].split(" hours")[0]) >= 1.0  # a step is some hundred million operations
    assert watched.traced == [watched.workdir / "stage1" / "logs", Path("stop")]


def test_pictures_are_drawn_with_what_the_stage_hands_on_and_errors_are_the_policys() -> None:
    measured: list[Any] = []
    found, policy, average = object.__new__(Monitor), {"x": jnp.ones(1)}, {"x": jnp.zeros(1)}
    found._sampler, found._held, found.log, found._reference = Mock(), [None], Mock(), {}
    found._sampler.decode.return_value = np.zeros((4, 8, 8, 3), np.float32)
    found._faces, found._prompts, found._stage, found._samples = Mock(), None, "stage1", Path("samples")
    found._faces.detect.return_value.found = np.array([1.0, 0.0, 0.0, 1.0])
    found._ids, found._keys, found._resolution, found._concept = "ids", "keys", (8, 8), "concept"
    found._measured = lambda policy, reference, i: measured.append(policy) or {"loss": np.zeros(())}
    EVALUATE(found, steps.TrainState(policy, average, (), jnp.zeros((), int)), 5)
    (drawn,) = found._sampler.use_policies.call_args.args
    assert drawn is average and measured[0] is policy
    assert found.log.write.call_args.args[0]["heldout/faces_found"] == 0.5
    assert found._sampler.generate.call_args.args == ("ids", "keys", (8, 8), "samples", "concept")
