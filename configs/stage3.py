"""Hard stage: almost-real photographs (t1 reconstructions) against the normal winners, on the same index set K.

    python -m hgdpo_jax.pairs --config configs/stage3.py:sd15 --workdir W
    python -m hgdpo_jax.main  --config configs/stage3.py:sd15 --workdir W

Hardware, memory of one device in a step, time of training, time of pairs:

    :sd15       GPU of 24 GB*           16.3 GiB  H100 4.9 h, A100 16 h     H100 0.1 s a photograph
    :sdxl       GPU of 24 GB*           19 GiB    H100 7.5 h, A100 24 h     H100 0.2 s a photograph
    :portraits  two processor cores     1.6 GiB   half a minute, measured  10 seconds

* sd15 and sdxl are planned, not run, as `configs/stage1.py` says: 20,000 steps of 349 and 533 TFLOP.
"""

from ml_collections import ConfigDict

from . import common


def get_config(variant: str = "sd15") -> ConfigDict:
    config = common.base(variant)
    config.stage = "stage3"
    config.pairs.winner = "sdrecon"
    config.pairs.strengths = (1,)
    config.pairs.loser = "stage2"
    config.train.start = "stage2"
    config.train.steps = 20_000
    if variant in common.EMBEDDED:
        config.train.steps = 150
        config.train.lr = 1e-3
        config.train.schedule = "cosine"
        config.train.beta = 500.0
        config.train.lambda_stat = 1_000_000.0
    return config
