"""Rows of the tables that train otherwise: on the pairs of several stages, or on their winners alone."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from hgdpo_jax.checking.check import check_training
from hgdpo_jax.curriculum import build
from hgdpo_jax.data.pairs import open_stage
from hgdpo_jax.diffusion.sampler import Sampler
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.folder import pair_stages, stage_config
from hgdpo_jax.run.settings import load_config
from hgdpo_jax.training.finished import finished_policy, finished_step
from hgdpo_jax.training.loop import train
from hgdpo_jax.training.policy import load_trainable, policy_of
from tests import tiny

TINY = ("train.lora_rank=2", "train.batch=8", "train.steps=1", "train.warmup=0", "train.lr=0.1")
TINY += ("data.resolutions=32x32",)


@pytest.mark.usefixtures("glance")
def test_a_lora_is_fine_tuned_on_the_winners_of_two_stages(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a stage, on pairs that have losers, which are left out."""
    given = [f"model.base={base}", *TINY, "train.pairs=stage1,stage3", "train.lora_modules=attention"]
    config = load_config("configs/ablations/sft.py:portraits,base", given)
    refused = "model /no/such/folder: no such folder"  # without it there is no step to plan
    elsewhere = load_config("configs/ablations/sft.py:portraits,base", [*given, "model.base=/no/such/folder"])
    for stage, pairs in (("stage1", 4), ("stage3", 8)):
        with pytest.raises(UserError, match=refused):
            check_training(elsewhere, tmp_path)
        assert f"the pairs of {stage} come first" in capsys.readouterr().out
        tiny.write_pairs(tmp_path / stage / "pairs", pairs, 4)
    with pytest.raises(UserError, match=refused):
        check_training(elsewhere, tmp_path)
    assert "pairs of heldout, 32x32: 8, train, 32x32: 12" in capsys.readouterr().out
    train(config, tmp_path)
    assert finished_step(tmp_path, "sft_after_base") == 1
    assert pair_stages(stage_config(tmp_path, "sft_after_base")) == ["stage1", "stage3"]
    _losers_are_drawn_by(config, "sft_after_base", tmp_path, monkeypatch)


def _losers_are_drawn_by(trained: ConfigDict, name: str, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool of SPIN's next iterate is drawn by the last one's policy."""
    given = [f"model.base={trained.model.base}", *TINY, f"pairs.policy={name}", f"train.start={name}"]
    given += [f"data.photographs={tiny.write_photographs(workdir / 'photographs', 2, 2)}", "data.mirror=false"]
    config = load_config("configs/baselines/spin.py:portraits,2", given)
    drawing: list[Any] = []

    def winners(config: ConfigDict, sampler: Sampler, *_: Any) -> Any:
        drawing.append(sampler._weights["unet"])
        blank = np.zeros(tiny.LATENT, np.float16)

        def begin(group: Any) -> Any:
            rows = range(len(group.photographs))
            return lambda: [group.record(i, blank, loser=blank, loser_score=0.0) for i in rows]

        return SimpleNamespace(begin=begin)

    monkeypatch.setattr(build, "winners_of", winners)
    build.build(config, workdir)
    assert f"content of the policy of {name}" in open_stage(workdir, "spin_2").manifest["made_from"]
    policy = finished_policy(workdir, name, policy_of(load_trainable(trained, tiny.mesh()), trained), trained)
    drawn = dict(nnx.to_flat_state(drawing[0]))
    learnt = [(drawn[path], value) for path, value in nnx.to_flat_state(policy["unet"])]
    assert learnt and all(np.array_equal(a[...], b[...]) for a, b in learnt)
    assert any(np.asarray(value[...]).any() for path, value in drawn.items() if path[-1] == "lora_B")
