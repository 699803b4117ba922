"""Hard stage: almost-real photographs (t1 reconstructions) against the normal winners, on the same index set K.

python -m hgdpo_jax.pairs --config configs/stage3.py --workdir W
python -m hgdpo_jax.main  --config configs/stage3.py --workdir W
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "sd15") -> ConfigDict:
    config = common.base(variant)
    config.stage = "stage3"
    config.pairs.winner = "sdrecon"
    config.pairs.strengths = (1,)
    config.pairs.loser = "stage2"
    config.train.start = "stage2"
    config.train.steps = 20_000
    if variant == "portraits":
        config.train.steps = 20
        config.train.lr = 1e-4
    return config
