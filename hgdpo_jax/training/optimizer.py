"""The optimizer, as the config's `train` group says."""

import optax
from ml_collections import ConfigDict


def make_optimizer(train: ConfigDict) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW or Adafactor under a linear warm-up and a constant or cosine rate.

    `train.clip_norm` 0 is no clipping. Moments are float32, like the parameters: AdamW keeps two numbers for each,
    Adafactor (Shazeer & Stern 2018) a row and a column for each large matrix. `train.warmup` is in optimizer steps.
    """
    warmup = optax.linear_schedule(train.lr / max(train.warmup, 1), train.lr, train.warmup)
    after = (
        optax.constant_schedule(train.lr)
        if train.schedule == "constant"
        else optax.cosine_decay_schedule(train.lr, max(train.steps - train.warmup, 1))
    )
    rate = optax.join_schedules([warmup, after], [train.warmup])
    if train.optimizer == "adafactor":
        # The rate is absolute, as AdamW's is: relative to the parameters, a LoRA would stay at its zero.
        decay = (lambda step: rate(step) * train.weight_decay) if train.weight_decay else None
        chosen = optax.adafactor(rate, multiply_by_parameter_scale=False, weight_decay_rate=decay)
    else:
        b1, b2 = train.adam
        chosen = optax.adamw(rate, b1=b1, b2=b2, weight_decay=train.weight_decay)
    return optax.chain(optax.clip_by_global_norm(train.clip_norm), chosen) if train.clip_norm else chosen
