"""Easy stage: the best against the worst of a pool of generated images.

Pool of N images per prompt from ε_base, each scored by f; winner = argmax, loser = argmin. Diffusion-DPO plus the
statistics loss, which holds the channel means of the latents and with them the colours.

    python -m hgdpo_jax.pairs --config configs/stage1.py --workdir W
    python -m hgdpo_jax.main  --config configs/stage1.py --workdir W
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "sd15") -> ConfigDict:
    config = common.base(variant)
    config.stage = "stage1"
    config.pairs.winner = "pool"
    config.pairs.loser = "pool"
    config.train.start = "base"
    config.train.lambda_stat = 10_000.0
    config.train.steps = 300_000
    if variant == "portraits":
        config.train.steps = 60
        config.train.beta = 500.0
        config.train.lambda_stat = 100_000.0
    return config
