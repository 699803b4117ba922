"""RealAlign (2605.19839), its second stage: a photograph wins over itself with its face redrawn by ε_base.

Outside the face's box the loser keeps the photograph's own noised latents at every step: SDRecon with a mask takes the
place of the published recipe's inpainting model. A pair is kept where the photograph scores at least 0.02 higher. The
first stage, DRO, is left out; Diffusion-DPO starts from ε_base.

    python -m hgdpo_jax.pairs --config configs/baselines/realalign.py:sd15 --workdir W
    python -m hgdpo_jax.main  --config configs/baselines/realalign.py:sd15 --workdir W

β, rate, warm-up, steps and rank are the published ones, for batches of 256. `--config.pairs.redraw=body` redraws more.
"""

from ml_collections import ConfigDict

from .. import common, naive


def get_config(variant: str = "sd15") -> ConfigDict:
    config = common.base(variant)
    config.stage = "realalign"
    config.pairs.winner = "photograph"
    config.pairs.loser = "sdrecon"
    config.pairs.strengths = (10,)
    config.pairs.redraw = "face"
    config.pairs.keep_if_winner_scores_higher = True
    config.pairs.least_gap = 0.02
    config.pairs.keep_candidates = True
    config.train.beta = 2000.0
    config.train.lr = 2.56e-6
    config.train.warmup = 125
    config.train.steps = 1000
    config.train.batch = 256
    config.train.lora_rank = 4
    config.train.lora_alpha = 4.0
    if variant in common.EMBEDDED:
        config.pairs.keep_if_winner_scores_higher = False  # as in configs/stage2.py
        config.pairs.least_gap = 0.0
        config.train = naive.get_config(variant).train
        config.train.lr = 1e-3  # at naive's its pictures break
    return config
