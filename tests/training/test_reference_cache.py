"""The reference's predictions, computed once: the margins they give, what goes on with them, what is refused."""

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from hgdpo_jax.data.loader import stack_records
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import file_hash
from hgdpo_jax.run.index import Index
from hgdpo_jax.run.settings import load_config
from hgdpo_jax.training import inputs as stage_inputs
from hgdpo_jax.training import kept, reference_cache, start
from hgdpo_jax.training import step as steps
from hgdpo_jax.training.checkpoints import Checkpoints, tree_hash
from hgdpo_jax.training.cost import operations
from hgdpo_jax.training.finished import finished_policy
from hgdpo_jax.training.inputs import Inputs
from hgdpo_jax.training.loop import train
from hgdpo_jax.training.optimizer import numbers_of
from hgdpo_jax.training.policy import load_trainable, policy_of
from hgdpo_jax.training.reference_cache import Draws
from hgdpo_jax.training.start import Start
from tests import tiny

DRAWS, RECORDS = 2, 24
CACHE = Path("stage1") / "reference_cache"
pytestmark = pytest.mark.usefixtures("glance")


def config(base: Path, **train: object) -> ConfigDict:
    return tiny.config(base, reference_cache=DRAWS, **train)


@pytest.fixture(scope="module")
def finished(base: Path, glance: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir with stage 1 trained for six steps."""
    workdir = tmp_path_factory.mktemp("run")
    tiny.write_pairs(workdir / "stage1" / "pairs", RECORDS)
    train(config(base, steps=6), workdir)
    return workdir


def begun(config: ConfigDict, workdir: Path) -> tuple[Inputs, Start]:
    """A stage as it is read, without predictions."""
    inputs = stage_inputs.read(config, workdir, Index())
    return inputs, start.start(config, workdir, inputs, Checkpoints(workdir / "stage1"))


def test_margins_are_those_of_a_reference_that_is_computed_in_the_step(finished: Path, base: Path) -> None:
    """As close as κ · 1e-6 for every pair and draw, and one of the four passes of a step is spared."""
    chosen = config(base, steps=6)
    inputs, begin = begun(chosen, finished)
    numbers = numbers_of(chosen, 0)
    (source,) = reference_cache.attach(chosen, finished / "stage1", inputs, begin, Index()).pairs.sources["train"]
    assert len(source) == DRAWS * RECORDS
    files = [np.load(path, mmap_mode="r").nbytes for path in (finished / CACHE).glob("*.npy")]
    assert len(files) == 2 and sum(files) == reference_cache.bytes_of_predictions(chosen, inputs.pairs)
    kappa, largest, seen = chosen.train.beta / 2, 0.0, set()

    def margin(policy: Any, batch: Any) -> jax.Array:
        return inputs.loss(policy, begin.reference, inputs.frozen, batch, numbers)[1]["dpo/margin"]

    def without(batch: dict) -> dict:
        return {name: x for name, x in batch.items() if name != "reference"}

    both = jax.jit(lambda policy, batch: (margin(policy, without(batch)), margin(policy, batch)))
    for i in range(len(source)):
        batch = jax.tree.map(jnp.asarray, stack_records(source, [i]))
        batch["key"] = steps.example_keys(numbers, batch.pop("example"))
        computed, kept = map(float, both(begin.state.policy, batch))
        assert abs(kept - computed) < 1e-6 * kappa
        largest = max(largest, abs(computed))
        seen.add(np.asarray(batch["reference"]).tobytes())
    assert largest > 1e-3 * kappa and len(seen) == DRAWS * RECORDS
    spared = operations(jax.make_jaxpr(margin)(begin.state.policy, batch).jaxpr)
    assert spared < 0.6 * operations(both.trace(begin.state.policy, batch).jaxpr)  # one pass of two, and the captions


def test_it_goes_on_with_what_is_kept(
    finished: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after four steps, with one of two files lost: that alone is computed again, and all ends as it did."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "stage1" / "policy" / "6")
    (tmp_path / "stage1" / "policy" / "6.sha256.json").unlink()
    first, second = sorted((tmp_path / CACHE).glob("*.npy"))
    expected = file_hash(second)
    second.with_name(f"{second.name}.json").unlink()
    second.unlink()
    written, write = [], kept.written
    monkeypatch.setattr(kept, "written", lambda rows, *x: written.append(rows.path) or write(rows, *x))
    train(config(base, steps=6), tmp_path)
    assert written == [second] and file_hash(second) == expected
    assert np.load(first).shape == (RECORDS // 2, DRAWS, 2, *tiny.LATENT)
    like = policy_of(load_trainable(config(base), tiny.mesh()), config(base))
    ended = [tree_hash(finished_policy(workdir, "stage1", like, config(base))) for workdir in (finished, tmp_path)]
    assert ended[0] == ended[1]


def test_other_predictions_are_refused(finished: Path, base: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    other = tiny.config(base, steps=8, reference_cache=DRAWS + 1)
    with pytest.raises(UserError, match="config key train.reference_cache=3: the checkpoint in .* was made with 2"):
        train(other, tmp_path)
    shutil.rmtree(tmp_path / "stage1" / "policy")
    with pytest.raises(UserError, match="train.reference_cache=3: .*reference_cache was made with 2; use that, or"):
        train(other, tmp_path)
    damaged = max((tmp_path / CACHE).glob("*.npy"))
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(UserError, match=f"{damaged}: missing or altered"):
        train(config(base), tmp_path)


def test_what_scales_a_lora_is_part_of_what_it_predicts(finished: Path, base: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "stage1" / "pairs", tmp_path / "stage1" / "pairs")
    shutil.copytree(finished / CACHE, tmp_path / CACHE)
    with pytest.raises(UserError, match="train.lora_alpha=4.0: .*reference_cache was made with 2.0; use that"):
        train(config(base, lora_alpha=4.0), tmp_path)
    (tmp_path / CACHE / "made_from.json").unlink()
    with pytest.raises(UserError, match="made_from.json: is missing, so nothing says what .* are of; remove its"):
        train(config(base), tmp_path)


def test_what_is_not_finite_is_not_kept(finished: Path, base: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "stage1" / "pairs", tmp_path / "stage1" / "pairs")
    inputs, begin = begun(config(base), tmp_path)
    broken = begin._replace(reference=jax.tree.map(lambda x: x * np.nan, begin.reference))
    with pytest.raises(UserError, match="what the reference predicts of pairs-train_32x32.*: NaN or infinite"):
        reference_cache.attach(config(base), tmp_path / "stage1", inputs, broken, Index())
    assert not list((tmp_path / CACHE).iterdir())


def test_supervised_fine_tuning_has_no_reference() -> None:
    with pytest.raises(
        UserError, match="train.reference_cache=1: does nothing here, it goes with a train.objective with a reference"
    ):
        load_config("configs/stage0_sft.py:portraits", ["train.reference_cache=1"])


def test_every_pass_sees_each_draw_of_each_pair_once() -> None:
    records = [{"winner": np.full(1, i, np.float16)} for i in range(5)]
    parts = np.split(np.arange(30.0).reshape(5, 3, 2, 1, 1, 1), [2])
    source = Draws(records, 3, parts)
    found = [source[i] for i in range(len(source))]
    assert [int(one["example"]) for one in found] == list(range(15))
    assert [int(one["winner"][0]) for one in found] == [i // 3 for i in range(15)]
    assert [one["reference"].ravel().tolist() for one in found] == [[2 * i, 2 * i + 1] for i in range(15)]


def test_how_a_flows_noise_levels_are_drawn_is_part_of_what_they_are_made_from() -> None:
    def made_from(*settings: str) -> dict[str, Any]:
        config = load_config("configs/stage1.py:klein", ["train.reference_cache=2", *settings])
        return reference_cache._made_from(config, {"the pairs": "0"})

    usual = made_from()
    assert usual != made_from("train.noise_shift=1") and usual != made_from("train.noise_levels=uniform")
    assert usual == made_from("train.lr=1e-6")


def test_the_room_of_a_file_is_taken_before_its_rows_come(tmp_path: Path) -> None:
    rows = kept.Rows(tmp_path / "cache" / "a.npy", (3, 100_000), np.dtype(np.float32))
    with kept.written(rows, {}) as values:
        (file,) = rows.path.parent.iterdir()
        assert 512 * file.stat().st_blocks >= rows.size
        values[:] = 1
    assert (np.load(rows.path) == 1).all()
