"""The pairs of all three stages at once, in one stage from ε_base, for as many steps as the three take together.

    python -m hgdpo_jax.main --config configs/ablations/all_pairs.py:sd15 --workdir W

Diffusion-DPO alone, as in configs/naive.py: whether the paper's row has the statistics loss, it does not say.
"""

from ml_collections import ConfigDict

from .. import naive


def get_config(variant: str = "sd15") -> ConfigDict:
    config = naive.get_config(variant)
    config.stage = "all_pairs"
    config.train.pairs = "stage1,stage2,stage3"
    return config
