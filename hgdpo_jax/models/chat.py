"""What FLUX.2 klein's text encoder reads: a prompt as the user's turn of a chat, and the token ids of that."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer

from hgdpo_jax.run.errors import UserError

LENGTH = 512  # tokens of a prompt in the pipeline of diffusers
MARKS = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")


def chat(prompt: str) -> str:
    """The prompt in the chat template of Qwen3, whose answer begins without a thought; also of the empty prompt."""
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def length_of(tokenizer: Qwen2Tokenizer) -> int:
    """Tokens of a prompt: 512, as diffusers' pipeline takes them, unless the tokenizer says fewer."""
    return min(LENGTH, tokenizer.model_max_length)


def chat_ids(tokenizer: Qwen2Tokenizer, prompts: Sequence[str], length: int | None = None) -> Int[np.ndarray, "b s"]:
    """Token ids int32 [b, length] of :func:`chat`, padded on the right. Of a longer prompt the end is lost, and with it
    the template's.

    `<|im_end|>` and others of Qwen3's marks in a prompt are these marks, not their letters, as in diffusers.

    Args:
        tokenizer: Qwen3's.
        prompts: to read.
        length: see :func:`length_of`, unless given.
    """
    ids = tokenizer(
        [chat(prompt) for prompt in prompts],
        padding="max_length",
        max_length=length_of(tokenizer) if length is None else length,
        truncation=True,
        return_tensors="np",
    ).input_ids
    return ids.astype(np.int32)


def byte_tokenizer(**settings: Any) -> Qwen2Tokenizer:
    """A tokenizer whose words are bytes, with Qwen3's marks: for models without a vocabulary of their own."""
    vocabulary = {byte: i for i, byte in enumerate(sorted(ByteLevel.alphabet()))}
    made = Qwen2Tokenizer(vocab=vocabulary, merges=[], **settings)
    made.add_tokens([AddedToken(mark, special=mark.startswith("<|"), normalized=False) for mark in MARKS])
    return made


def open_tokenizer(folder: Path) -> Qwen2Tokenizer:
    """Qwen3's tokenizer from its folder, as transformers writes it.

    Raises:
        UserError: it is none, or pads on the left.
    """
    try:
        tokenizer = Qwen2Tokenizer.from_pretrained(folder, local_files_only=True)
        own = len(tokenizer(chat("")).input_ids)
        if chat_ids(tokenizer, [""]).shape[1] <= own:
            raise ValueError(
                f"model_max_length {tokenizer.model_max_length}, the chat around a prompt takes {own} tokens"
            )
    except Exception as error:  # transformers' and tokenizers' errors have no class in common
        reason = " ".join(str(error).split())
        raise UserError(f"{folder}: not a tokenizer that can be read ({reason}); copy the folder again") from error
    for mark in MARKS:
        if mark not in tokenizer.added_tokens_encoder:
            raise UserError(f"{folder}: its tokenizer has no token {mark}; expected Qwen3's, copy the folder again")
    if tokenizer.padding_side != "right":
        raise UserError(f"{folder}: its tokenizer pads on the {tokenizer.padding_side}; expected on the right")
    return tokenizer
