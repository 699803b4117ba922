"""Easy stage with another weight of the statistics loss, on its own pairs: 0 is a row of the paper's table.

    python -m hgdpo_jax.main --config configs/ablations/lambda_stat.py:sd15,0 --workdir W

The same with latent adaptive normalisation, another row, is only drawn:
`python -m hgdpo_jax.sample --workdir W --stage lambda_stat_0 --lan …`.
"""

from ml_collections import ConfigDict

from .. import common, stage1


def get_config(variant: str = "") -> ConfigDict:
    variant, weight = common.with_number(variant, "0")
    config = stage1.get_config(variant)
    config.stage = f"lambda_stat_{weight}"
    config.train.pairs = "stage1"
    config.train.lambda_stat = float(weight)
    return config
