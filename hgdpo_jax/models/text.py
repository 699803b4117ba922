"""What the denoiser is conditioned on: one CLIP text encoder (Stable Diffusion 1.x, 2.x), two and the size (XL), or
Qwen3 (FLUX.2 klein).

Legend: `b` captions, `s` tokens, `d` width of the text embeddings, `p` of the pooled one.

XL's two encoders read what two tokenizers make of a caption, as in diffusers. These pad with other tokens, and to the
second its padding `!` is a special token: `wow!!` is one word and its mark to the first, a word and two paddings to the
second. (Stability's own code differs: its second tokenizer is OpenCLIP's, to which `!` is a mark and `<|endoftext|>` is
plain text.) The ids of both travel in one array: the first's in the lower 16 bits, the second's in the upper ones.
"""

from abc import abstractmethod
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from hgdpo_jax.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from hgdpo_jax.models.qwen3 import Qwen3Model
from hgdpo_jax.run.errors import UserError

_BITS = 16  # of a token id
CLIP_POSITIONS = 77  # of CLIP's text encoders


def both(first: Int[np.ndarray, "b s"], second: Int[np.ndarray, "b t"]) -> Int[np.ndarray, "b s"]:
    """Ids of two tokenizers in one int32 array. Raises UserError where they do not fit."""
    if first.shape != second.shape or max(first.max(), second.max()) >= 2**_BITS:
        raise UserError(f"tokenizers: give {first.shape[1]} and {second.shape[1]} ids, the highest is "
                        f"{max(first.max(), second.max())}; expected as many, below {2**_BITS}")  # fmt: skip
    return (first.astype(np.uint32) | second.astype(np.uint32) << _BITS).view(np.int32)


def of_clip(ids: Int[Array, "b s"]) -> Int[Array, "b t"]:
    """The ids of CLIP's tokenizer, for scorers: what Stable Diffusion reads, by its first tokenizer; behind the others'
    ids where the base has another vocabulary."""
    return of_first(ids[:, -CLIP_POSITIONS:])


def of_first(ids: Int[Array, "b s"]) -> Int[Array, "b s"]:
    """The ids of the first tokenizer, or of the only one."""
    return ids & (2**_BITS - 1)


class Encoded(NamedTuple):
    """What text encoders make of captions, for images of whatever size: the embeddings and, for XL, the pooled ones."""

    encoder_hidden_states: Float[Array, "b s d"]
    text_embeds: Float[Array, "b p"] | None = None


class Conditioning(NamedTuple):
    """Text embeddings and, for XL, {text_embeds [b, p], time_ids [b, 6]}: the arguments of the UNet after x_t and t."""

    encoder_hidden_states: Float[Array, "b s d"]
    added_cond: dict[str, Array] | None = None


def conditioning(encoded: Encoded, size: tuple[int, int]) -> Conditioning:
    """What captions say to a denoiser of images of `size`, height and width in pixels.

    XL's six numbers are the original size, the top left corner of the crop and the size: here always an uncropped
    image of this size, in training as in sampling (Podell et al. 2023, section 2.2).
    """
    if encoded.text_embeds is None:
        return Conditioning(encoded.encoder_hidden_states)
    numbers = jnp.asarray([*size, 0, 0, *size], jnp.int32)
    time_ids = jnp.tile(numbers, (len(encoded.text_embeds), 1))
    return Conditioning(encoded.encoder_hidden_states, {"text_embeds": encoded.text_embeds, "time_ids": time_ids})


class Conditioner(nnx.Module):
    """Token ids → :class:`Conditioning`. What follows the ids of a caption is not for it.

    Attributes:
        empty_ids: token ids of the empty caption, [s].
        zero_empty: the conditioning of the empty caption is zero, as XL was trained (`force_zeros_for_empty_prompt`).
    """

    empty_ids: tuple[int, ...]
    zero_empty: bool = False

    @abstractmethod
    def encode(self, input_ids: Int[Array, "b s"]) -> Encoded:
        """What does not depend on the size of images."""

    def __call__(self, input_ids: Int[Array, "b s"], size: tuple[int, int]) -> Conditioning:
        """Conditioning of captions for images of `size`, height and width in pixels; ids as in `empty_ids`."""
        return conditioning(self.encode(input_ids), size)

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


class TextConditioner(Conditioner):
    """One or two CLIP text encoders.

    Args:
        text_encoder: the only encoder, or XL's first.
        text_encoder_2: XL's second.
        empty_ids: begin, end, padding; of :func:`both` tokenizers for XL.
        pad_2: token id with which the second tokenizer pads, where ids are of the first alone, as in pairs that
            were built by version 0.1.
        zero_empty: see :class:`Conditioner`.
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

    def encode(self, input_ids: Int[Array, "b s"]) -> Encoded:
        """Of XL both encoders' embeddings side by side, and the second's pooled ones."""
        if not hasattr(self, "text_encoder_2"):
            return Encoded(self.text_encoder(input_ids).last_hidden_state)
        first = self.text_encoder(of_first(input_ids))
        second = self.text_encoder_2(self._of_second(input_ids))
        return Encoded(jnp.concatenate([first.hidden_states[-2], second.hidden_states[-2]], axis=-1), second.pooled)

    def _of_second(self, ids: Int[Array, "b s"]) -> Int[Array, "b s"]:
        given = of_first(ids >> _BITS)
        # Not the highest id where words were added to the vocabulary.
        ends = ids == self.empty_ids[1] & (2**_BITS - 1)
        padded = jnp.where(jnp.cumsum(ends, axis=1) - ends > 0, self.pad_2, ids)
        return jnp.where(given[:, :1] > 0, given, padded)  # a text begins with the highest id but one


class FluxText(Conditioner):
    """The states of Qwen3 of a prompt, those of the padding too, as FLUX.2 klein reads them.

    Args:
        text_encoder: Qwen3.
        empty_ids: of the empty prompt, [s], see :func:`hgdpo_jax.models.chat.chat_ids`.
        padding: token id with which prompts are padded.
    """

    def __init__(self, text_encoder: Qwen3Model, *, empty_ids: tuple[int, ...], padding: int) -> None:
        self.text_encoder, self.empty_ids, self.padding = text_encoder, empty_ids, padding

    def encode(self, input_ids: Int[Array, "b s"]) -> Encoded:
        """The states of some layers side by side."""
        ids = input_ids[:, : len(self.empty_ids)]
        return Encoded(self.text_encoder(ids, before_padding(ids, self.padding)))


class KeptText(Conditioner):
    """Some captions that were encoded before, without the encoder. Of others it gives NaN.

    Args:
        ids: token ids of the captions, [m, s].
        encoded: what an encoder made of them, m rows; shapes where a program is planned.
        like: the conditioner of that encoder.
    """

    def __init__(self, ids: Int[Array, "m s"] | jax.ShapeDtypeStruct, encoded: Encoded, like: Conditioner) -> None:
        self.empty_ids, self.zero_empty = like.empty_ids, like.zero_empty
        self.ids, self.encoder_hidden_states = nnx.Variable(ids), nnx.Variable(encoded.encoder_hidden_states)
        if encoded.text_embeds is not None:
            self.text_embeds = nnx.Variable(encoded.text_embeds)

    def encode(self, input_ids: Int[Array, "b s"]) -> Encoded:
        """The rows of these captions."""
        same = (input_ids[:, None, : len(self.empty_ids)] == self.ids[...]).all(-1)  # [b m]
        row, known = same.argmax(1), same.any(1)

        def of(rows: nnx.Variable) -> Array:
            return jax.vmap(lambda known, x: jnp.where(known, x, jnp.nan))(known, rows[...][row])

        return Encoded(of(self.encoder_hidden_states), of(self.text_embeds) if hasattr(self, "text_embeds") else None)


def encoded_shapes(text: Conditioner, count: int) -> Encoded:
    """Shapes of what a conditioner makes of so many captions; its weights may be shapes too."""
    graph, state = nnx.split(text)
    ids = jax.ShapeDtypeStruct((count, len(text.empty_ids)), jnp.int32)
    return jax.eval_shape(lambda state, ids: nnx.merge(graph, state).encode(ids), state, ids)


def before_padding(ids: Int[Array, "b s"], padding: int | Int[Array, ""]) -> Bool[Array, "b s"]:
    """False where there is nothing but padding to the end of a row: the same token within a prompt is read.

    (At the end of a prompt that fills the row too it is taken for padding: only its own state changes.)
    """
    return jax.lax.cummax((ids != padding).astype(jnp.int32), axis=1, reverse=True) > 0
