"""Easy stage: the best against the worst of a pool of generated images.

Pool of N images per prompt from ε_base, each scored by f; winner = argmax, loser = argmin. Diffusion-DPO plus the
statistics loss, which holds the channel means of the latents and with them the colours.

    python -m hgdpo_jax.pairs --config configs/stage1.py:sd15 --workdir W
    python -m hgdpo_jax.main  --config configs/stage1.py:sd15 --workdir W

Hardware, memory of one device in a step, time of training, time of pairs:

    :sd15       GPU of 24 GB*           16.3 GiB  H100 74 h, A100 233 h     H100 14 s a prompt
    :sdxl       GPU of 24 GB*           19 GiB    H100 112 h, A100 356 h    H100 23 s a prompt
    :portraits  two processor cores     1.7 GiB   half a minute, measured   1 minute

* with `XLA_CLIENT_MEM_FRACTION=0.9` in the environment: of a GPU's memory JAX takes three quarters unless told.

sd15 and sdxl are planned (`hgdpo_jax.plan`), not run: 16 pairs of 1024x704 a step are 349 and 533 TFLOP; 300,000 steps
at 40 % of a device's bfloat16 peak. Memory is the weights (2.2 and 6.8 GiB) and what the gradient keeps of a pair (0.9
and 0.7 GiB with checkpointing=blocks, 3.7 and 6.7 with none). Pictures are decoded in float32, 1.7 GiB each: below
48 GB add `--config.pairs.batch=4 --config.evaluate.batch=4`.
"""

from ml_collections import ConfigDict

from . import common


def get_config(variant: str = "sd15") -> ConfigDict:
    config = common.base(variant)
    config.stage = "stage1"
    config.pairs.winner = "pool"
    config.pairs.loser = "pool"
    config.train.start = "base"
    config.train.lambda_stat = 10_000.0
    config.train.steps = 300_000
    if variant == "klein":
        config.train.lambda_stat = 16_000.0  # as much of a loss for the same shift of 128 channels in a step of Euler's
    if variant in common.EMBEDDED:
        config.train.steps = 30
        config.train.lr = 1e-3
        config.train.beta = 3000.0
        config.train.lambda_stat = 1_000_000.0
    return config
