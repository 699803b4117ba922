"""Normal stage: half-reconstructed photographs against the easy winners.

SDRecon noises a photograph's latent to t4…t7 (400…700 of 1000) and denoises it with ε_base; the best-scoring one
wins over the easy stage's winner where it scores at least as high (the index set K). Diffusion-DPO alone.

    python -m hgdpo_jax.pairs --config configs/stage2.py --workdir W
    python -m hgdpo_jax.main  --config configs/stage2.py --workdir W
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "sd15") -> ConfigDict:
    config = common.base(variant)
    config.stage = "stage2"
    config.pairs.winner = "sdrecon"
    config.pairs.strengths = (4, 5, 6, 7)
    config.pairs.loser = "stage1"
    config.pairs.keep_if_winner_scores_higher = True
    config.train.start = "stage1"
    config.train.steps = 20_000
    if variant == "portraits":
        config.train.steps = 60
        config.train.beta = 2000.0
    return config
