"""What pairs depend on: a folder of pairs is not continued with another setting that decides what they are."""

from pathlib import Path

import numpy as np
import pytest

from hgdpo_jax.curriculum.forwards import pool_drawings, pool_forwards, saving
from hgdpo_jax.curriculum.plan import depends_on, group_size
from hgdpo_jax.diffusion.schedule import NoiseSchedule
from hgdpo_jax.diffusion.trajectory import from_noise
from hgdpo_jax.run import provenance
from hgdpo_jax.run.settings import load_config
from tests import tiny

DRAWN = {"sampler": "ddim", "steps": 7, "guidance": 3.5, "negative_prompt": "a drawing"}
DRAWN |= {"guidance_interval": (200, 800)}
KINDS = {
    "easy": ({"winner": "pool", "loser": "pool"}, DRAWN | {"pool_size": 7}, {"strengths": (1,)}),
    "normal": ({"winner": "sdrecon", "loser": "stage1"}, DRAWN | {"strengths": (1, 2)}, {"pool_size": 7, "race": 0.5}),
    "naive": ({"winner": "photograph", "loser": "pool"}, DRAWN | {"pool_size": 7}, {"strengths": (1,)}),
    "raced": ({"winner": "pool", "loser": "pool", "race": 0.5}, {"race": 0.3, "finalists": 3, "pool_size": 7}, {}),
    "drafted": ({"winner": "pool", "loser": "pool", "draft_steps": 9}, {"draft_steps": 4, "finalists": 3}, {}),
    "sft": ({"winner": "photograph", "loser": "none"}, {}, DRAWN | {"strengths": (1,), "pool_size": 7}),
    "given": ({"winner": "given", "loser": "given"}, {}, DRAWN | {"strengths": (1,), "pool_size": 7}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_decides_the_pairs_must_stay_and_nothing_else(kind: str, tmp_path: Path) -> None:
    chosen, decisive, others = KINDS[kind]
    config = tiny.config(tmp_path)
    config.pairs.update(chosen)

    def made_from() -> dict:
        return provenance.settings(config, depends_on(config))

    before = made_from()
    decisive = decisive | {"shard_size": 3, "keep_if_winner_scores_higher": True}
    for group, key, value, decides in [
        *(("pairs", key, value, True) for key, value in decisive.items()),
        *(("pairs", key, value, False) for key, value in (others | {"batch": 3}).items()),
        ("data", "mirror", True, True),
        ("data", "split", "base", True),
        ("data", "resolutions", ("64x32",), True),
        ("model", "dtype", "bfloat16", True),
        ("train", "lr", 1.0, False),
    ]:
        old, config[group][key] = config[group][key], value
        assert (made_from() != before) == decides, f"{group}.{key}"
        config[group][key] = old
    config.seed = 1
    assert made_from() != before


def test_groups_fill_whole_batches_before_and_after_most_are_dropped(tmp_path: Path) -> None:
    config = tiny.config(tmp_path)
    for batch, pool, finalists, size in ((16, 20, 2, 4), (16, 20, 3, 8), (32, 8, 2, 8), (12, 8, 1, 6)):
        config.pairs.update(batch=batch, pool_size=pool, race=0.5, finalists=finalists)
        assert group_size(config) == size
        assert pool * size % batch == 2 * finalists * size % batch == 0


def test_forward_passes_are_those_of_all_steps_of_all_pictures(tmp_path: Path) -> None:
    config, schedule = tiny.config(tmp_path), NoiseSchedule.from_config(tiny.SCHEDULER)
    config.pairs.update(sampler="ddim", steps=10, pool_size=20, guidance=5.0)
    assert pool_forwards(config, schedule) == 20 * 10 * 2 and saving(config, schedule) == []
    config.pairs.update(guidance_interval=(200, 800))
    t = from_noise(schedule, "ddim", 10).table.t[:10]
    inside = int(np.sum((t >= 200) & (t <= 800)))
    assert 0 < inside < 10 and pool_forwards(config, schedule) == 20 * (10 + inside)
    config.pairs.update(guidance_interval=(0, 1000), race=0.3, finalists=3)
    assert pool_forwards(config, schedule) == 2 * (20 * 3 + 6 * 7) and pool_drawings(config) == 20 * 0.3 + 6 * 0.7
    assert saving(config, schedule) == ["a pool takes 204 forward passes instead of 400"]
    config.pairs.update(race=0.0, draft_steps=2)
    assert pool_forwards(config, schedule) == 2 * (20 * 2 + 6 * 10) and pool_drawings(config) == 20 * 0.2 + 6
    config.pairs.update(guidance=1.0)
    assert pool_forwards(config, schedule) == 20 * 2 + 6 * 10
    documented = load_config("configs/stage1.py:sd15", ["pairs.draft_steps=6"])
    assert f"stage1 pairs: {saving(documented, schedule)[0]}\n" in Path("docs/performance.md").read_text()
    config.pairs.update(loser="stage1", winner="sdrecon")  # whose pools are no race
    assert pool_drawings(config) == 20 and saving(config, schedule) == []
