"""AdamW with warm-up, as the config's `train` group says."""

import optax
from ml_collections import ConfigDict


def make_optimizer(train: ConfigDict) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW under a linear warm-up and a constant or cosine rate.

    Moments are float32, like the parameters. `train.warmup` is in optimizer steps.
    """
    warmup = optax.linear_schedule(train.lr / max(train.warmup, 1), train.lr, train.warmup)
    after = (
        optax.constant_schedule(train.lr)
        if train.schedule == "constant"
        else optax.cosine_decay_schedule(train.lr, max(train.steps - train.warmup, 1))
    )
    rate = optax.join_schedules([warmup, after], [train.warmup])
    b1, b2 = train.adam
    return optax.chain(
        optax.clip_by_global_norm(train.clip_norm),
        optax.adamw(rate, b1=b1, b2=b2, weight_decay=train.weight_decay),
    )
