"""HG-DPO's inference recipe: how strongly a stage's LoRA acts, in which blocks, and while which timesteps.

The paper draws with the hard stage's LoRA at weight 0.5 in the UNet's up blocks only, to keep the base's diversity, and
with the text encoder's LoRA at weight 0.5 while t is in [900, 1000], where the layout of an image is decided.
"""

from collections.abc import Callable
from typing import NamedTuple

from flax import nnx
from jaxtyping import Array, Bool, Int, PyTree

from hgdpo_jax.run.errors import UserError

Params = PyTree  # of arrays
TEXT_FROM = 900


class Drawing(NamedTuple):
    """How a model and its LoRA are drawn with, as the recipe does, here and in diffusers.

    Attributes:
        sampler: ours.
        scheduler: diffusers' class, with which the script beside an export draws; empty for the checkpoint's own: then
            the LoRA acts in all steps alike, and the pipeline needs no script.
        steps, guidance: of it.
    """

    sampler: str
    scheduler: str
    steps: int
    guidance: float


def text_policy_acts(t: Int[Array, "b"]) -> Bool[Array, "b"]:
    """Whether a text encoder's policy is used at these timesteps."""
    return t >= TEXT_FROM


def as_drawn(policy: Params, blocks: str, weight: float, normal: Params | None = None) -> Params:
    """A stage's LoRA as the recipe draws with it.

    Args:
        policy: LoRA of the UNet.
        blocks: where it acts: `all`; `up`, the other blocks being the base's; `up+normal`, the others keeping `normal`.
        weight: of it.
        normal: the normal stage's LoRA, for `up+normal`.
    """
    acting = policy if blocks == "all" else in_up_blocks(policy, normal if blocks == "up+normal" else None)
    return weighted(acting, weight)


def weighted(policy: Params, weight: float | Callable[[tuple], float]) -> Params:
    """A LoRA of another strength: B is multiplied by `weight`, a number or a function of a parameter's path."""

    def scaled(path: tuple, x: nnx.Variable) -> nnx.Variable:
        if path[-1] != "lora_B":
            return x
        return x.replace((weight(path) if callable(weight) else weight) * x[...])

    return nnx.from_flat_state([(path, scaled(path, x)) for path, x in nnx.to_flat_state(policy)])


def in_up_blocks(policy: Params, elsewhere: Params | None = None) -> Params:
    """A LoRA of the UNet in its up blocks only.

    Args:
        policy: of the hard stage.
        elsewhere: the LoRA that the down and middle blocks keep, such as that of the stage before; the base's, which is
            none, unless given. "Applied to the up blocks only" allows both: the hard stage started from the former.

    Raises:
        UserError: the model has no up blocks.
    """
    if not any("up_blocks" in path for path, _ in nnx.to_flat_state(policy)):
        raise UserError("config key recipe.blocks: this model has no up blocks, its LoRA would do nothing; expects all")
    if elsewhere is None:
        return weighted(policy, lambda path: float("up_blocks" in path))
    own = dict(nnx.to_flat_state(policy))
    others = nnx.to_flat_state(elsewhere)
    return nnx.from_flat_state([(path, own[path] if "up_blocks" in path else x) for path, x in others])
