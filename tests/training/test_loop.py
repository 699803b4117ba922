"""The training command: kill and resume, the predecessor, and what it refuses."""

import gc
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hgdpo_jax.data.loader import PairLoader
from hgdpo_jax.errors import UserError
from hgdpo_jax.files import file_hash, owned
from hgdpo_jax.training import loop, metrics, monitor
from hgdpo_jax.training import policy as policies
from hgdpo_jax.training import step as steps
from hgdpo_jax.training.checkpoints import Checkpoints, tree_hash
from hgdpo_jax.training.inputs import depends_on
from hgdpo_jax.training.loop import train
from hgdpo_jax.training.metrics import MetricLog
from hgdpo_jax.training.monitor import UNLEARNING, Monitor
from hgdpo_jax.training.optimizer import make_optimizer
from hgdpo_jax.training.speed import Speed
from tests import tiny
from tests.patience import patience

RUN = """
import sys
from pathlib import Path
from tests import tiny
from hgdpo_jax.training.loop import train
from hgdpo_jax.training.monitor import Monitor
base, workdir, steps = sys.argv[1:]
Monitor.look = tiny.glance
train(tiny.config(Path(base), steps=int(steps)), Path(workdir))
"""


LOOK = Monitor.look
pytestmark = pytest.mark.usefixtures("glance")


@pytest.fixture(scope="module")
def finished(base: Path, glance: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir with stage 1 trained for six steps, under a name that shells and other programs treat specially."""
    workdir = tmp_path_factory.mktemp("run") / "my run: {1} & ü"
    for stage in ("stage1", "stage2"):
        tiny.write_pairs(workdir / stage / "pairs")
    train(tiny.config(base, steps=6), workdir)
    return workdir


def everything(workdir: Path, base: Path, step: int, stage: str = "stage1") -> str:
    """A hash of all that a checkpoint holds."""
    config = tiny.config(base)
    pipeline = policies.load(config, tiny.mesh())
    like = steps.init_state(policies.of(pipeline, config), make_optimizer(config.train), 0.0)
    checkpoints = Checkpoints(workdir / stage)
    state = jax.device_put(like, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    return tree_hash(checkpoints.restore(step, state)) + repr(checkpoints.meta(step)["position"])


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(finished: Path, base: Path, tmp_path: Path) -> None:
    tiny.write_pairs(tmp_path / "stage1" / "pairs")
    command = [sys.executable, "-c", RUN, str(base), str(tmp_path), "6"]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + patience(50)
        while not (tmp_path / "stage1" / "policy" / "2.sha256.json").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    resumed_from = Checkpoints(tmp_path / "stage1").latest()
    assert resumed_from is not None and resumed_from < 6
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert everything(tmp_path, base, 6) == everything(finished, base, 6)


def test_the_log_says_how_fast_it_is(finished: Path) -> None:
    lines = metrics.read(finished / "stage1" / "logs")[1:]  # before the first step there was a look
    assert [line["step"] for line in lines] == [*range(1, 7)]
    assert all(line["train/learning_rate"] == np.float32(1e-2) for line in lines)
    assert "speed/step_seconds" not in lines[0]  # it was compiled
    for line in lines[1:]:
        assert line["speed/pairs_per_second"] == pytest.approx(8 / line["speed/step_seconds"])
        assert line["speed/hours_left"] == pytest.approx((6 - line["step"]) * line["speed/step_seconds"] / 3600)
        assert line["speed/tflops_per_second"] > 0 and "speed/share_of_peak" not in line


def test_a_batch_is_fetched_while_the_step_before_is_computed_and_not_counted_before_its_own(
    finished: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _copy(finished, tmp_path)
    assert Checkpoints(tmp_path / "stage1").meta(6)["position"] == 6 * 8
    order: list[str] = []
    for owner, name in ((Speed, "step"), (PairLoader, "__next__"), (MetricLog, "means")):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, f=function, n=name: order.append(n) or f(*given))
    train(tiny.config(base, steps=8), tmp_path)
    assert order == ["__next__"] + ["step", "__next__", "means"] * 2


def test_a_damaged_checkpoint_is_passed_over(
    finished: Path, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _copy(finished, tmp_path)
    expected = everything(tmp_path, base, 6)
    newest = tmp_path / "stage1" / "policy" / "6"
    damage(newest)
    assert Checkpoints(tmp_path / "stage1").latest() == 4
    assert f"{newest}: incomplete or altered" in caplog.text
    train(tiny.config(base, steps=6), tmp_path)
    assert everything(tmp_path, base, 6) == expected


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target, dirs_exist_ok=True)


def test_a_stage_starts_from_its_predecessors_policy_which_becomes_its_reference(
    finished: Path, base: Path, tmp_path: Path
) -> None:
    _copy(finished, tmp_path)
    config = tiny.config(base, "stage2", start="stage1", steps=2)
    train(config, tmp_path)
    like = policies.of(policies.load(config, tiny.mesh()), config)
    easy = policies.finished(tmp_path, "stage1", like, config)
    checkpoints = Checkpoints(tmp_path / "stage2")
    found = checkpoints.restore_reference(like, checkpoints.meta(2)["reference"])
    assert tree_hash(found) == tree_hash(easy) != tree_hash(like)
    assert tree_hash(policies.finished(tmp_path, "stage2", like, config)) != tree_hash(easy)


def test_a_policy_keeps_its_strength_where_lora_is_scaled_otherwise(finished: Path, base: Path) -> None:
    same, twice = tiny.config(base), tiny.config(base, lora_alpha=4.0)
    like = policies.of(policies.load(same, tiny.mesh()), same)
    own, halved = (policies.finished(finished, "stage1", like, config) for config in (same, twice))
    for (path, a), (_, b) in zip(jax.tree.leaves_with_path(own), jax.tree.leaves_with_path(halved), strict=True):
        assert np.array_equal(b, a / 2 if "lora_B" in jax.tree_util.keystr(path) else a)


def test_a_reference_with_another_hash_is_refused(finished: Path, base: Path, tmp_path: Path) -> None:
    _copy(finished, tmp_path)
    config = tiny.config(base)
    like = policies.of(policies.load(config, tiny.mesh()), config)
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
    line = "config key train.lr=0.5: the checkpoint in .* was made with 0.01; use that, or another --workdir"
    with pytest.raises(UserError, match=line):
        train(tiny.config(base, steps=8, lr=0.5), finished)
    assert file_hash(finished / "stage1" / "config.json") == before


def test_nan_stops_and_keeps_the_last_good_checkpoint(
    finished: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _copy(finished, tmp_path)
    batch = PairLoader.__next__
    infinite = np.full((8, *tiny.LATENT), np.inf, np.float32)
    monkeypatch.setattr(PairLoader, "__next__", lambda loader: batch(loader) | {"winner": infinite})
    config = tiny.config(base, steps=8)
    with pytest.raises(UserError, match=r"loss/\w+ is (nan|inf) at step 7: training stopped"):
        train(config, tmp_path)
    assert Checkpoints(tmp_path / "stage1").latest() == 6
    assert everything(tmp_path, base, 6) == everything(finished, base, 6)


def test_a_gradient_that_is_no_number_stops_at_its_step_whatever_the_loss(tmp_path: Path) -> None:
    log = MetricLog(tmp_path)
    for step, norm in ((1, 1.0), (2, np.nan), (3, 1.0)):
        log.add(step, {"loss/total": np.float32(0.7), "gradient_norm": np.float32(norm)})
    with pytest.raises(UserError, match="gradient_norm is nan at step 2: training stopped"):
        log.means()


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
    policy, gradient = {"x": jnp.ones(3)}, {"x": jnp.full(3, 100.0)}
    updates = []
    for norm in (0.0, 1e6, 1e-6):
        tx = make_optimizer(tiny.config(base, clip_norm=norm, warmup=0).train)
        moments = tx.update(gradient, tx.init(policy), policy)[1]
        updates.append(np.asarray(optax.tree.get(moments, "mu")))
    assert np.array_equal(updates[0], updates[1])  # a norm that nothing reaches
    assert abs(updates[0]).min() > 1e6 * abs(updates[2]).max()


def test_a_policy_that_unlearns_the_winners_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    monitor = object.__new__(Monitor)
    monitor._worst = UNLEARNING
    for step, error in ((1, 0.105), (2, 0.13), (3, 0.131), (4, 0.4)):
        monitor.watch({"error/winner": error, "error/winner_reference": 0.1}, step)
    assert [record.getMessage()[:6] for record in caplog.records] == ["step 2", "step 4"]
    assert "lower config.train.lr, raise config.train.beta" in caplog.text


def test_steps_that_were_raised_and_lowered_again_leave_the_stage_finished(
    finished: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _copy(finished, tmp_path)
    with monkeypatch.context() as killed:
        killed.setattr(loop, "_run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(tiny.config(base, steps=9), tmp_path)
    config = tiny.config(base, steps=6)
    like = policies.of(policies.load(config, tiny.mesh()), config)
    with pytest.raises(UserError, match="stage1 stands at step 6 of 9"):
        policies.finished(tmp_path, "stage1", like, config)
    train(config, tmp_path)
    policies.finished(tmp_path, "stage1", like, config)


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


def test_what_a_stage_depends_on_follows_its_settings(base: Path) -> None:
    constant, cosine = (tiny.config(base, schedule=schedule) for schedule in ("constant", "cosine"))
    assert set(depends_on(cosine)) - set(depends_on(constant)) == {"train.steps"}
    assert not {"train.accumulate", "train.checkpointing", "mesh", "model.base"} & set(depends_on(constant))


def test_one_command_at_a_time_trains_a_stage(finished: Path, base: Path) -> None:
    with owned(finished / "stage1"), pytest.raises(UserError, match="stage1: is being written by .* wait until that"):
        train(tiny.config(base, steps=8), finished)


def test_half_a_line_of_the_log_is_forgotten(tmp_path: Path) -> None:
    log = MetricLog(tmp_path)
    log.write({"a": 1.0}, 1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "a')
    assert metrics.read(tmp_path) == [{"step": 1, "a": 1.0}]
    MetricLog(tmp_path).write({"a": 3.0}, 2)
    assert metrics.read(tmp_path) == [{"step": 1, "a": 1.0}, {"step": 2, "a": 3.0}]


def test_the_checkpoint_comes_before_the_pictures_which_a_resumed_run_makes_up_for(
    finished: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    _copy(finished, tmp_path)
    with monkeypatch.context() as killed:
        killed.setattr(Monitor, "look", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(tiny.config(base, steps=8), tmp_path)
    assert Checkpoints(tmp_path / "stage1").latest() == 8 and not metrics.looked(tmp_path / "stage1" / "logs", 8)
    made: list[int] = []

    def look(monitor: Monitor, state: steps.TrainState, step: int) -> None:
        made.append(step)
        LOOK(monitor, state, step)
        monitor._say_noise(state.policy)

    monkeypatch.setattr(Monitor, "look", look)
    for _ in range(2):
        train(tiny.config(base, steps=8), tmp_path)
    assert made == [8] and metrics.looked(tmp_path / "stage1" / "logs", 8)
    noise = re.search(r"stage1: float32 tells margins apart from ([\d.e-]+) on", capsys.readouterr().out)
    assert 0.0 < float(noise[1]) < 100.0


def test_noise_is_that_of_all_margins_however_few_a_batch_has(capsys: pytest.CaptureFixture) -> None:
    found = object.__new__(Monitor)
    found._stage, found._dtype, found._rate, found._held = "stage1", "bfloat16", 0.0, [None] * 20
    found._measured = lambda policy, reference, i: {"dpo/margin": 3.0 * (-1) ** i, "dpo/margin_deviation": 4.0}
    found._say_noise({"x": jnp.ones(1)})
    assert "stage1: bfloat16 tells margins apart from 5 on" in capsys.readouterr().out


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
    finished: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    _copy(finished, tmp_path)
    warned: list[str] = []
    monkeypatch.setattr(monitor, "_LARGE", 1e3)
    monkeypatch.setattr(monitor, "CORE", 1e4)
    monkeypatch.setattr(monitor.logging, "warning", lambda text, *values: warned.append(text % values))
    train(tiny.config(base, steps=7), tmp_path, range(7, 10))
    said = capsys.readouterr().out
    assert "stage1: cpu, 8 x cpu, mesh data 8 x fsdp 1 x tensor 1, 8 pairs a step" in said
    assert "stage1: trains lora, 1,248 of 449,688 parameters" in said
    parameters = [line.split()[1:] for line in said.splitlines() if line.endswith(("trained", "frozen"))]
    assert ["unet.mid_block", "480", "float32", "trained"] in parameters
    assert sum(int(count.replace(",", "")) for _, count, *_ in parameters) == 449_688
    assert "winner float16 [8, 4, 4, 8], loser float16 [8, 4, 4, 8], input_ids int32 [8, 77]" in said
    assert said.count("peak unknown") == 1
    assert list((tmp_path / "stage1" / "logs").rglob("*.xplane.pb"))
    assert [line for line in warned if "is trained on a processor: 1 steps will take about" in line]
    hours = float(warned[0].split("about ")[1].split(" hours")[0])
    assert hours >= 1.0  # a step of this model is about a billion operations
