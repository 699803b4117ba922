"""The training command: kill and resume, the predecessor, and what it refuses."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from hgdpo_jax.data.loader import PairLoader
from hgdpo_jax.errors import UserError
from hgdpo_jax.files import file_hash
from hgdpo_jax.training import policy as policies
from hgdpo_jax.training import step as steps
from hgdpo_jax.training.checkpoints import Checkpoints, tree_hash
from hgdpo_jax.training.loop import train
from hgdpo_jax.training.optimizer import make_optimizer
from tests import tiny

RUN = """
import sys
from pathlib import Path
from tests import tiny
from hgdpo_jax.training.loop import train
base, workdir, steps = sys.argv[1:]
train(tiny.config(Path(base), steps=int(steps)), Path(workdir))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir with stage 1 trained for six steps."""
    workdir = tmp_path_factory.mktemp("run")
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
        deadline = time.monotonic() + 200
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


def test_a_damaged_checkpoint_is_passed_over(
    finished: Path, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _copy(finished, tmp_path)
    expected = everything(tmp_path, base, 6)
    newest = tmp_path / "stage1" / "policy" / "6"
    data = max((f for f in newest.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
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
    easy = policies.finished(tmp_path, "stage1", like)
    checkpoints = Checkpoints(tmp_path / "stage2")
    found = checkpoints.restore_reference(like, checkpoints.meta(2)["reference"])
    assert tree_hash(found) == tree_hash(easy) != tree_hash(like)
    assert tree_hash(policies.finished(tmp_path, "stage2", like)) != tree_hash(easy)


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
