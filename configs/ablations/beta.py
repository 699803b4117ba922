"""Easy stage without the statistics loss, at another β: a higher one is what else would hold the colours.

    python -m hgdpo_jax.main --config configs/ablations/beta.py:sd15,25000 --workdir W

The paper does not say how high its β is; the easy stage's own is 5000.
"""

from ml_collections import ConfigDict

from .. import common, stage1


def get_config(variant: str = "") -> ConfigDict:
    variant, beta = common.with_number(variant, "25000")
    config = stage1.get_config(variant)
    config.stage = f"beta_{beta}"
    config.train.pairs = "stage1"
    config.train.lambda_stat = 0.0
    config.train.beta = float(beta)
    return config
