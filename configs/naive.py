"""What the curriculum is compared with: photographs against ε_base's drawings, in one stage.

Each photograph wins over one picture that ε_base drew for its caption. Diffusion-DPO alone, for as many steps as the
three stages take together. In the paper it collapses: FID 37 → 113.

    python -m hgdpo_jax.pairs --config configs/naive.py:sd15 --workdir W
    python -m hgdpo_jax.main  --config configs/naive.py:sd15 --workdir W

Hardware, memory and time of a step are those of configs/stage2.py.
"""

from ml_collections import ConfigDict

from . import common, stage1, stage2, stage3


def get_config(variant: str = "sd15") -> ConfigDict:
    config = common.base(variant)
    config.stage = "naive"
    config.pairs.winner = "photograph"
    config.pairs.loser = "pool"
    config.pairs.pool_size = 1
    config.train.start = "base"
    config.train.steps = sum(stage.get_config(variant).train.steps for stage in (stage1, stage2, stage3))
    if variant in common.EMBEDDED:
        for key in ("lr", "schedule", "beta"):
            config.train[key] = stage2.get_config(variant).train[key]
    return config
