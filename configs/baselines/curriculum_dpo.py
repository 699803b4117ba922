"""Curriculum-DPO (Croitoru et al., 2405.13637): pairs of one pool, those whose ranks are far apart first.

The pool of a prompt is ranked by its scores. Stage k of B learns from the buckets 1 to k, of which bucket 1 holds pairs
whose ranks differ most, against ε_base. A prompt has one pair in each bucket, chosen at random.

    for k in 1 2 3 4 5; do
        python -m hgdpo_jax.pairs --config configs/baselines/curriculum_dpo.py:sd15,$k --workdir W
        python -m hgdpo_jax.main  --config configs/baselines/curriculum_dpo.py:sd15,$k --workdir W
    done

400 steps each at 3e-4, β 5000 and rank 8 are its paper's. :portraits has pools of 4, and 3 buckets: 1, 2, 3.
"""

from ml_collections import ConfigDict

from .. import common, naive


def get_config(variant: str = "") -> ConfigDict:
    variant, k = common.with_count(variant, "1")
    config = common.base(variant)
    config.stage = f"curriculum_dpo_{k}"
    config.pairs.bucket = k
    config.pairs.keep_candidates = True
    config.train.pairs = ",".join(f"curriculum_dpo_{i}" for i in range(1, k + 1)) if k > 1 else ""
    config.train.start = f"curriculum_dpo_{k - 1}" if k > 1 else "base"
    config.train.reference = "base"
    config.train.steps = 400
    config.train.lr = 3e-4
    if variant in common.EMBEDDED:
        config.pairs.buckets = 3
        config.train.steps = naive.get_config(variant).train.steps // config.pairs.buckets
        for key in ("schedule", "beta"):
            config.train[key] = naive.get_config(variant).train[key]
        config.train.lr = 1e-3  # at naive's its pictures break
    return config
