"""The curriculum without its easy stage: normal from ε_base, then hard from that, on the pairs of those stages.

    python -m hgdpo_jax.main --config configs/ablations/without_easy.py:sd15,normal --workdir W
    python -m hgdpo_jax.main --config configs/ablations/without_easy.py:sd15,hard   --workdir W

The second is the row of the paper's table.
"""

from ml_collections import ConfigDict

from .. import common, stage2, stage3


def get_config(variant: str = "") -> ConfigDict:
    variant, stage = common.with_choice(variant, "normal", "hard")
    config = {"normal": stage2, "hard": stage3}[stage].get_config(variant)
    config.train.pairs = config.stage
    config.train.start = "base" if stage == "normal" else "without_easy_normal"
    config.stage = f"without_easy_{stage}"
    return config
