"""Text encoder: LoRA of rank 64 on CLIP, the UNet frozen at ε_base, on the easy stage's pairs.

It restores the alignment with the prompt that the hard stage costs, and is used together with ε_H while t is in
[900, 1000] (see hgdpo_jax/diffusion/recipe.py). It needs the pairs of stage 1, not its policy. Diffusion-DPO alone; the
paper does not say how long: as long as the normal and the hard stage.

    python -m hgdpo_jax.main --config configs/text_encoder.py --workdir W

Hardware, memory and time of a step are those of configs/stage2.py: the gradient goes through the same UNet, and the
text encoder is small beside it.
"""

from ml_collections import ConfigDict

from . import common


def get_config(variant: str = "sd15") -> ConfigDict:
    config = common.of_stable_diffusion(variant)
    config.stage = "text_encoder"
    config.train.pairs = "stage1"
    config.train.params = "text_lora"
    config.train.lora_rank = 64
    config.train.lora_alpha = 64.0
    config.train.steps = 20_000
    if variant in common.EMBEDDED:
        config.train.steps = 40
        config.train.beta = 500.0
    return config
