"""Hard stage with another winner than t1: tK for K = 1…10, or for 0 the photograph itself.

    python -m hgdpo_jax.pairs --config configs/ablations/winner.py:sd15,0 --workdir W
    python -m hgdpo_jax.main  --config configs/ablations/winner.py:sd15,0 --workdir W

0 is a row of the paper's table, hardly different from t1.
"""

from ml_collections import ConfigDict

from .. import common, stage3


def get_config(variant: str = "") -> ConfigDict:
    variant, strength = common.with_count(variant, "0", 0)
    config = stage3.get_config(variant)
    config.stage = f"winner_t{strength}"
    common.draw_as_hard(config)
    if strength == 0:
        config.pairs.winner, config.pairs.strengths = "photograph", common.base(variant).pairs.strengths
    else:
        config.pairs.strengths = (strength,)
    config.pairs.keep_candidates = True
    return config
