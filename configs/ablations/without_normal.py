"""The curriculum without its normal stage: hard from the easy policy, on the hard stage's pairs.

    python -m hgdpo_jax.main --config configs/ablations/without_normal.py:sd15 --workdir W

The paper does not say who loses here. These are the pairs of configs/stage3.py, so that only the way to them differs.
"""

from ml_collections import ConfigDict

from .. import stage3


def get_config(variant: str = "sd15") -> ConfigDict:
    config = stage3.get_config(variant)
    config.stage = "without_normal"
    config.train.pairs = "stage3"
    config.train.start = "stage1"
    return config
