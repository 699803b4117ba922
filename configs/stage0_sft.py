"""Base: supervised fine-tuning on the photographs with the noise-prediction loss.

    python -m hgdpo_jax.pairs --config configs/stage0_sft.py:sd15 --workdir W
    python -m hgdpo_jax.main  --config configs/stage0_sft.py:sd15 --workdir W

Hardware, memory of one device, time of training:

    :sd15       GPU of 40 GB            24 GiB    H100 2.3 h, A100 7.2 h
    :sdxl       GPU of 80 GB            49 GiB    H100 3.7 h, A100 12 h
    :portraits  two processor cores     2.1 GiB   90 minutes (:portraits-flow 70, on an Intel Xeon)

sd15 and sdxl are planned (`hgdpo_jax.plan`), not run: 16 photographs of 1024x704 a step are 161 and 264 TFLOP; 20,000
steps at 40 % of a device's bfloat16 peak. Memory is the UNet in float32 four times (13 and 38 GiB: the base, what is
trained, AdamW), and gradients with what they keep of 16 photographs (11 and 9 GiB). Pictures for the log take 1.7 GiB
each: on 40 GB add `--config.evaluate.batch=8`.
"""

from ml_collections import ConfigDict

from hgdpo_jax.config import default

from . import common


def get_config(variant: str = "sd15") -> ConfigDict:
    config = common.base(variant)
    config.stage = "stage0"
    config.train.beta = default().train.beta  # of no use here
    config.train.objective = "sft"
    config.data.caption_dropout = 0.1
    config.pairs.winner = "photograph"
    config.pairs.loser = "none"
    config.train.params = "all"
    if variant in common.EMBEDDED:
        # From nothing: the folder holds the VAE, the text encoder and a random UNet or transformer.
        config.data.split = "base"
        config.data.mirror = False
        config.pairs.shard_size = 1024
        config.train.steps = 30_000
        config.train.batch = 32
        config.train.lr = 1e-3
        config.train.schedule = "cosine"
        config.train.warmup = 200
        config.train.adam = (0.9, 0.99)
        config.train.ema = 0.999
        config.train.checkpoint_every = 1000
        config.train.log_every = 50
        config.train.eval_every = 4000
        if variant == "portraits-flow":
            config.train.steps = 9_500
            config.train.lr = 2e-3
    return config
