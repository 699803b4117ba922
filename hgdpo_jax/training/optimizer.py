"""The optimizer and the scalars of a step, as the config says."""

import math
from typing import Any

import jax
import numpy as np
import optax
import optax.contrib
from ml_collections import ConfigDict

from hgdpo_jax.devices.random import stream_key
from hgdpo_jax.training.adam8bit import adamw_8bit
from hgdpo_jax.training.loss_scale import with_loss_scale
from hgdpo_jax.training.step import GRADIENT_NORM, Numbers

# Beside `train.beta` and `train.lambda_stat`; in the step only where it is above 0.
ADDED = ("label_smoothing", "safeguard", "sft_weight", "auto_beta")
_PUBLISHED = {"dspo": 0.001, "mapo": 0.1, "smpo": 10.0}  # `train.objective_weight`
_FIRST_ESTIMATE = 1e-6  # Prodigy's, of the rate: it only ever rises


def make_optimizer(train: ConfigDict) -> optax.GradientTransformationExtraArgs:
    """Clipping by global norm, then `train.optimizer` with a rate of 1: the step multiplies by :func:`learning_rate`.

    It holds the :mod:`loss's scale <hgdpo_jax.training.loss_scale>`. `train.clip_norm` 0 is no clipping. AdamW keeps
    two numbers for each parameter, float32 or :mod:`8 bits <hgdpo_jax.training.adam8bit>`; Adafactor (Shazeer & Stern
    2018) a row and a column for each large matrix; Prodigy (Mishchenko & Defazio 2023, algorithm 4) four numbers: what
    it finds is a rate without warm-up and cosine, which multiply it. Weight decay is decoupled.
    """
    b1, b2 = train.adam
    if train.optimizer == "adafactor":
        # The rate is absolute, as AdamW's is: relative to the parameters, a LoRA would stay at its zero.
        decay = train.weight_decay or None
        chosen = optax.adafactor(1.0, multiply_by_parameter_scale=False, weight_decay_rate=decay)
    elif train.optimizer == "adamw8bit":
        chosen = adamw_8bit(b1, b2, train.weight_decay)
    elif train.optimizer == "prodigy":
        chosen = optax.contrib.prodigy(1.0, (b1, b2), estim_lr0=_FIRST_ESTIMATE, weight_decay=train.weight_decay)
    else:
        chosen = optax.adamw(1.0, b1=b1, b2=b2, weight_decay=train.weight_decay)
    clip = optax.clip_by_global_norm(train.clip_norm) if train.clip_norm else optax.identity()
    chosen = with_loss_scale(optax.chain(optax.snapshot(GRADIENT_NORM, optax.tree.norm), clip, chosen))
    # LoRA is some hundred small arrays, each of which would cost a GPU a few programs: they are one vector here.
    one_vector = train.optimizer != "adafactor" and train.params.endswith("lora")
    return optax.flatten(chosen) if one_vector else chosen


def first_step(train: ConfigDict) -> float:
    """How far a step at full rate moves a parameter, before a training knows more."""
    return train.lr * (_FIRST_ESTIMATE if train.optimizer == "prodigy" else 1.0)


def learning_rate(train: ConfigDict, step: int) -> float:
    """The rate of the step after `step` others: it rises over `train.warmup` steps, then it stays, or falls as a cosine
    that is 0 at `train.steps` (Loshchilov and Hutter 2017)."""
    if step < train.warmup:
        return train.lr * (step + 1) / train.warmup
    if train.schedule == "constant":
        return train.lr
    done = (step - train.warmup) / max(train.steps - train.warmup, 1)
    return train.lr * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))


def numbers_of(config: ConfigDict, step: int) -> Numbers:
    """The scalars of the step after `step` others, as the config says."""
    train, data = config.train, config.data
    key = np.asarray(jax.random.key_data(stream_key(config.seed, config.stage, "step")))
    least_scale = 1.0 if config.model.dtype == "float16" else math.inf
    scalars = (train.ema, least_scale, train.beta, train.lambda_stat, data.caption_dropout, data.concept_dropout)
    numbers = Numbers(key, np.float32(learning_rate(train, step)), *map(np.float32, scalars))
    added: dict[str, Any] = {name: np.float32(train[name]) for name in ADDED if train[name]}
    if train.objective in _PUBLISHED:
        added["objective_weight"] = np.float32(train.objective_weight or _PUBLISHED[train.objective])
    return numbers._replace(**added)
