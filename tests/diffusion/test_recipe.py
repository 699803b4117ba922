"""The recipe: which blocks a LoRA acts in, how strongly, and when."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hgdpo_jax.diffusion import recipe
from hgdpo_jax.run.errors import UserError


def lora(value: float) -> nnx.State:
    blocks = ("down_blocks", "mid_block", "up_blocks")
    return nnx.from_flat_state(
        [
            (("unet", block, leaf), nnx.LoRAParam(jnp.full(2, value)))
            for block in blocks
            for leaf in ("lora_A", "lora_B")
        ]
    )


def values(policy: nnx.State) -> dict[str, list[float]]:
    """B by block; A must have stayed."""
    found: dict[str, list[float]] = {"lora_A": [], "lora_B": []}
    for path, x in nnx.to_flat_state(policy):
        found[path[-1]].append(float(x[...][0]))
    return found


def test_a_lora_is_drawn_with_at_half_its_weight_in_the_blocks_that_are_asked_for() -> None:
    hard, normal = lora(4.0), lora(2.0)
    assert values(recipe.as_drawn(hard, "all", 0.5)) == {"lora_A": [4.0] * 3, "lora_B": [2.0] * 3}
    assert values(recipe.as_drawn(hard, "up", 0.5)) == {"lora_A": [4.0] * 3, "lora_B": [0.0, 0.0, 2.0]}
    assert values(recipe.as_drawn(hard, "up", 0.5, normal))["lora_B"] == [0.0, 0.0, 2.0]
    both = values(recipe.as_drawn(hard, "up+normal", 0.25, normal))
    assert both == {"lora_A": [2.0, 2.0, 4.0], "lora_B": [0.5, 0.5, 1.0]}
    assert values(hard) == {"lora_A": [4.0] * 3, "lora_B": [4.0] * 3}


def test_a_model_without_up_blocks_is_not_drawn_with_in_them() -> None:
    policy = nnx.from_flat_state([(("transformer", "single_transformer_blocks", "lora_B"), nnx.LoRAParam(jnp.ones(2)))])
    with pytest.raises(UserError, match=r"^config key recipe\.blocks: this model has no up blocks, .*; expects all$"):
        recipe.as_drawn(policy, "up", 0.5)


def test_the_text_encoders_policy_acts_from_900() -> None:
    acts = recipe.text_policy_acts(jnp.array([0, 899, 900, 999]))
    assert np.asarray(acts).tolist() == [False, False, True, True]
