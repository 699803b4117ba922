"""Personalisation: an IP-Adapter on ε_base, with the face of each photograph as its concept image.

The paper trains InstantBooth, whose code is not public; an IP-Adapter is what people use. It learns beside the frozen
base by noise prediction on the photographs, and is then used with HG-DPO's LoRA without further training:
`python -m hgdpo_jax.sample --workdir W --concept PHOTO …`. The image encoder of the published adapters for SD 1.5 is
CLIP ViT-H/14 (`--config.adapter.image_encoder=DIR`).

    python -m hgdpo_jax.pairs --config configs/personalise.py --workdir W
    python -m hgdpo_jax.main  --config configs/personalise.py --workdir W

Hardware and memory are those of configs/stage2.py, and of the image encoder while pairs are built; a step, on 16
photographs instead of 16 pairs with a reference, costs about a third. :portraits takes ten minutes on two processor
cores, once; it ships trained.
"""

from ml_collections import ConfigDict

from . import common


def get_config(variant: str = "sd15") -> ConfigDict:
    config = common.of_stable_diffusion(variant)
    config.stage = "personalise"
    config.train.objective = "sft"
    config.data.caption_dropout = 0.1
    config.data.concept_dropout = 0.1
    config.pairs.winner = "photograph"
    config.pairs.loser = "none"
    config.train.params = "adapter"
    config.train.lr = 1e-4
    config.train.weight_decay = 0.01
    config.train.steps = 100_000
    if variant in common.EMBEDDED:
        # On what the base learnt from: thousands of people, where the curriculum has a hundred.
        config.data.split = "base"
        config.data.mirror = False
        config.pairs.shard_size = 1024
        config.train.steps = 1500
        config.train.batch = 32
        config.train.lr = 2e-3
        config.train.warmup = 100
        config.train.schedule = "cosine"
        config.train.ema = 0.99
        config.train.checkpoint_every = 200
        config.train.eval_every = 200
    return config
