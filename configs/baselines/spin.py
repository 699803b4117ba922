"""SPIN-Diffusion (2402.10210): photographs win over what the last iterate draws, which is the reference, too.

    for k in 1 2 3; do
        python -m hgdpo_jax.pairs --config configs/baselines/spin.py:sd15,$k --workdir W
        python -m hgdpo_jax.main  --config configs/baselines/spin.py:sd15,$k --workdir W
    done

Iterate 1 is configs/naive.py for 500 steps. Steps and rate are those of its published models, whose batches are 2048;
its β is not known here.
"""

from ml_collections import ConfigDict

from .. import common, naive


def get_config(variant: str = "") -> ConfigDict:
    variant, k = common.with_count(variant, "1")
    config = naive.get_config(variant)
    config.stage = f"spin_{k}"
    if k > 1:
        config.pairs.policy = config.train.start = f"spin_{k - 1}"
    config.train.steps = 500
    config.train.lr = 2e-5
    if variant in common.EMBEDDED:
        config.train.steps = 160
        config.train.lr = 1e-3  # at naive's its pictures break
    return config
