"""The config of a small CLIPModel, and its training: the two embedded scorers share them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array
from tqdm import tqdm

from hgdpo_jax.models.clip import CLIPModel
from tools.make_assets.photographs import SIZE

_TOWER = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}


def config(width: int, layers: int, patch: int) -> dict[str, Any]:
    """config.json of a CLIPModel for the embedded pictures, with a vision tower of this size."""
    return {
        "architectures": ["CLIPModel"],
        "logit_scale_init_value": 2.6592,
        "model_type": "clip",
        "projection_dim": 32,
        "text_config": {
            **_TOWER,
            "bos_token_id": 49406,
            "eos_token_id": 49407,
            "hidden_size": 8,
            "intermediate_size": 32,
            "max_position_embeddings": 77,
            "model_type": "clip_text_model",
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "pad_token_id": 49407,
            "vocab_size": 49408,
        },
        "vision_config": {
            **_TOWER,
            "hidden_size": width,
            "image_size": SIZE,
            "intermediate_size": 3 * width,
            "model_type": "clip_vision_model",
            "num_attention_heads": 4,
            "num_channels": 3,
            "num_hidden_layers": layers,
            "patch_size": patch,
        },
    }


class Task(NamedTuple):
    """What a scorer learns.

    Attributes:
        name: for the progress bar.
        config: config.json of the CLIPModel.
        loss: (model, *arrays of a batch) → loss and measures.
        batch: draws the arrays of a batch with a random generator.
        heldout: the arrays of one batch.
    """

    name: str
    config: dict[str, Any]
    loss: Callable[..., tuple[Array, Array]]
    batch: Callable[[np.random.Generator], tuple[np.ndarray, ...]]
    heldout: tuple[np.ndarray, ...]


def fit(task: Task, steps: int, seed: int) -> tuple[CLIPModel, np.ndarray]:
    """A CLIPModel trained from nothing with AdamW under a cosine, and the measures on the held-out batch."""
    graph, weights = nnx.split(CLIPModel(task.config, rngs=nnx.Rngs(seed)))
    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 100, steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.1))

    @jax.jit
    def step(weights: nnx.State, optimizer: optax.OptState, arrays: tuple[np.ndarray, ...]) -> tuple:
        objective = lambda weights: task.loss(nnx.merge(graph, weights), *arrays)  # noqa: E731
        (_, measures), grads = jax.value_and_grad(objective, has_aux=True)(weights)
        updates, optimizer = tx.update(grads, optimizer, weights)
        return optax.apply_updates(weights, updates), optimizer, measures

    measure = jax.jit(lambda weights, arrays: task.loss(nnx.merge(graph, weights), *arrays)[1])
    optimizer, rng = tx.init(weights), np.random.default_rng(seed)
    with tqdm(range(steps), desc=task.name, unit="step") as bar:
        for i in bar:
            weights, optimizer, measures = step(weights, optimizer, task.batch(rng))
            if i % 100 == 0:
                found, held = np.asarray(measures), np.asarray(measure(weights, task.heldout))
                bar.set_postfix_str(" ".join(f"{a:.2f}/{b:.2f}" for a, b in zip(found, held, strict=True)))
    return nnx.merge(graph, weights), np.asarray(measure(weights, task.heldout))
