"""Offline DPO: one stage on preference pairs that exist already, such as Pick-a-Pic v2 or HPDv3.

Nothing is drawn and no scorer is needed: both pictures are encoded, cut alike by the winner's shape. Diffusion-DPO
alone (Wallace et al. 2023), from ε_base.

    python -m hgdpo_jax.pairs --config configs/given.py:sd15 --workdir W --config.data.pairs=pairs.jsonl
    python -m hgdpo_jax.main  --config configs/given.py:sd15 --workdir W --config.data.pairs=pairs.jsonl

Hardware, memory and time of a step are those of configs/stage2.py.
"""

from ml_collections import ConfigDict

from . import common


def get_config(variant: str = "sd15") -> ConfigDict:
    config = common.base(variant)
    config.stage = "given"
    config.pairs.winner = "given"
    config.pairs.loser = "given"
    config.train.start = "base"
    config.train.steps = 20_000
    if variant in common.EMBEDDED:
        config.train.steps = 60
    return config
