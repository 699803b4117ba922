"""Base: supervised fine-tuning on the photographs with the noise-prediction loss.

python -m hgdpo_jax.pairs --config configs/stage0_sft.py --workdir W
python -m hgdpo_jax.main  --config configs/stage0_sft.py --workdir W
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "sd15") -> ConfigDict:
    config = common.base(variant)
    config.stage = "stage0"
    config.objective = "sft"
    config.data.caption_dropout = 0.1
    config.pairs.winner = "photograph"
    config.pairs.loser = "none"
    config.train.params = "all"
    if variant == "portraits":
        # From nothing: the folder holds the VAE, the text encoder and a randomly initialised UNet.
        config.data.split = "base"
        config.train.steps = 1500
        config.train.batch = 32
        config.train.lr = 2e-3
        config.train.warmup = 100
        config.train.schedule = "cosine"
        config.train.ema = 0.99
        config.train.checkpoint_every = 500
        config.train.eval_every = 250
    return config
