"""Supervised fine-tuning on the hard stage's winners, in place of the hard stage: after ε_base, easy or normal.

    python -m hgdpo_jax.main --config configs/ablations/sft.py:sd15,easy --workdir W

For as many steps as the hard stage, at its rate; the paper says neither.
"""

from ml_collections import ConfigDict

from hgdpo_jax.run.settings import CURRICULUM

from .. import common, stage0_sft, stage3


def get_config(variant: str = "") -> ConfigDict:
    variant, after = common.with_choice(variant, "base", "easy", "normal")
    config, hard = stage0_sft.get_config(variant), stage3.get_config(variant)
    config.stage = f"sft_after_{after}"
    config.data.split, config.data.mirror = hard.data.split, hard.data.mirror
    of_dpo = ("objective", "beta", "lambda_stat")
    config.train.update({key: value for key, value in hard.train.items() if key not in of_dpo})
    config.train.pairs = "stage3"
    config.train.start = CURRICULUM.get(after, "base")
    return config
