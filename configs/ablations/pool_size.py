"""Easy stage with pools of another size: N = 2 is a row of the paper's table, against 20.

    python -m hgdpo_jax.pairs --config configs/ablations/pool_size.py:sd15,2 --workdir W
    python -m hgdpo_jax.main  --config configs/ablations/pool_size.py:sd15,2 --workdir W

Where `pairs.keep_candidates` kept the pool of configs/stage1.py, a smaller one is the first of it: nothing is drawn.
"""

from ml_collections import ConfigDict

from .. import common, stage1


def get_config(variant: str = "") -> ConfigDict:
    variant, size = common.with_count(variant, "2", 2)
    config = stage1.get_config(variant)
    config.stage = f"pool_{size}"
    config.pairs.pool_size = size
    config.pairs.keep_candidates = True
    return config
