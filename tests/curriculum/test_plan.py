"""What pairs depend on: a folder of pairs is not continued with another setting that decides what they are."""

from pathlib import Path

import pytest

from hgdpo_jax.curriculum.plan import depends_on
from hgdpo_jax.run import provenance
from tests import tiny

DRAWN = {"sampler": "ddim", "steps": 7, "guidance": 3.5, "negative_prompt": "a drawing"}
KINDS = {
    "easy": ({"winner": "pool", "loser": "pool"}, DRAWN | {"pool_size": 7}, {"strengths": (1,)}),
    "normal": ({"winner": "sdrecon", "loser": "stage1"}, DRAWN | {"strengths": (1, 2)}, {"pool_size": 7}),
    "naive": ({"winner": "photograph", "loser": "pool"}, DRAWN | {"pool_size": 7}, {"strengths": (1,)}),
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
