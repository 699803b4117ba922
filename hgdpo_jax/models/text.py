"""What the UNet is conditioned on: one CLIP text encoder (Stable Diffusion 1.x, 2.x), or two and the size (XL).

Legend: `b` captions, `s` tokens, `d` width of the text embeddings, `p` of the pooled one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from hgdpo_jax.models.clip import CLIPTextModel, CLIPTextModelWithProjection


class Conditioning(NamedTuple):
    """Text embeddings and, for XL, {text_embeds [b, p], time_ids [b, 6]}: the arguments of the UNet after x_t and t."""

    encoder_hidden_states: Float[Array, "b s d"]
    added_cond: dict[str, Array] | None = None


class TextConditioner(nnx.Module):
    """Token ids → :class:`Conditioning`.

    Args:
        text_encoder: the only encoder, or XL's first.
        text_encoder_2: XL's second.
        empty_ids: token ids of the empty caption, [s]: begin, end, padding.
        pad_2: token id with which the second tokenizer pads; the two differ in nothing else.
        zero_empty: the conditioning of the empty caption is zero, as XL was trained (`force_zeros_for_empty_prompt`).
    """

    def __init__(
        self,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection | None = None,
        *,
        empty_ids: tuple[int, ...],
        pad_2: int = 0,
        zero_empty: bool = False,
    ) -> None:
        self.text_encoder = text_encoder
        if text_encoder_2 is not None:
            self.text_encoder_2 = text_encoder_2
        self.empty_ids, self.pad_2, self.zero_empty = empty_ids, pad_2, zero_empty

    def __call__(self, input_ids: Int[Array, "b s"], size: tuple[int, int]) -> Conditioning:
        """Conditioning of captions for images of `size`, height and width in pixels.

        XL's six numbers are the original size, the top left corner of the crop and the size: here always an uncropped
        image of this size, in training as in sampling (Podell et al. 2023, section 2.2).
        """
        first = self.text_encoder(input_ids)
        if not hasattr(self, "text_encoder_2"):
            return Conditioning(first.last_hidden_state)
        ends = input_ids == self.empty_ids[1]  # not the highest id where words were added to the vocabulary
        after_end = jnp.cumsum(ends, axis=1) - ends > 0
        second = self.text_encoder_2(jnp.where(after_end, self.pad_2, input_ids))
        numbers = jnp.asarray([*size, 0, 0, *size], jnp.int32)
        return Conditioning(
            jnp.concatenate([first.hidden_states[-2], second.hidden_states[-2]], axis=-1),
            {"text_embeds": second.pooled, "time_ids": jnp.tile(numbers, (input_ids.shape[0], 1))},
        )

    def empty(self, count: int, size: tuple[int, int], negative_ids: Int[Array, "1 s"] | None = None) -> Conditioning:
        """The conditioning of the empty caption, or of a negative prompt in its place, `count` times."""
        nothing = jnp.asarray([self.empty_ids], jnp.int32)
        ids = nothing if negative_ids is None else negative_ids
        result = self(ids, size)
        if self.zero_empty:
            given = jnp.where((ids == nothing).all(), 0.0, 1.0).astype(result.encoder_hidden_states.dtype)
            added = result.added_cond and result.added_cond | {"text_embeds": given * result.added_cond["text_embeds"]}
            result = Conditioning(given * result.encoder_hidden_states, added)
        return jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), result)
