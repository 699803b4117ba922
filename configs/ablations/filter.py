"""Normal and hard stage with the other choice of the filter K: without it, or with it where a variant has none.

    python -m hgdpo_jax.pairs --config configs/ablations/filter.py:sd15,normal --workdir W
    python -m hgdpo_jax.main  --config configs/ablations/filter.py:sd15,normal --workdir W

and the same with `hard`. :sd15 and :sdxl filter, as the paper; :portraits does not.
"""

from ml_collections import ConfigDict

from .. import common, stage2, stage3


def get_config(variant: str = "") -> ConfigDict:
    variant, stage = common.with_choice(variant, "normal", "hard")
    config = {"normal": stage2, "hard": stage3}[stage].get_config(variant)
    config.stage = f"other_filter_{stage}"
    config.pairs.keep_candidates = True
    if stage == "normal":
        config.pairs.keep_if_winner_scores_higher = not config.pairs.keep_if_winner_scores_higher
    else:  # on the index set of the stage before
        config.pairs.loser = config.train.start = "other_filter_normal"
        common.draw_as_hard(config)
    return config
