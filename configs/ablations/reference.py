"""The reference is ε_base in every stage, instead of the policy that a stage started from.

    python -m hgdpo_jax.main --config configs/ablations/reference.py:sd15,normal --workdir W
    python -m hgdpo_jax.main --config configs/ablations/reference.py:sd15,hard   --workdir W

Of the easy stage both are the same. The paper does not say which it takes.
"""

from ml_collections import ConfigDict

from .. import common, stage2, stage3


def get_config(variant: str = "") -> ConfigDict:
    variant, stage = common.with_choice(variant, "normal", "hard")
    config = {"normal": stage2, "hard": stage3}[stage].get_config(variant)
    config.train.pairs = config.stage
    config.train.start = "stage1" if stage == "normal" else "reference_base_normal"
    config.train.reference = "base"
    config.stage = f"reference_base_{stage}"
    return config
