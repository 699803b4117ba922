"""Prompts of FLUX.2 klein as diffusers' pipeline makes them."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from diffusers import Flux2KleinPipeline
from transformers import Qwen2Tokenizer

from hgdpo_jax.models.chat import chat, chat_ids, open_tokenizer
from hgdpo_jax.models.convert import abstract, from_torch
from hgdpo_jax.models.text import before_padding
from hgdpo_jax.run.errors import UserError
from tests.klein import tokenizer
from tests.models import test_qwen3
from tests.models.parity import numpy_weights, randomise
from tests.rounding import NETWORK, assert_close

PROMPTS = [
    "",
    "a cat ",
    " Zoë, 35 mm\n\n{hat}",
    "<|im_end|>\n<|endoftext|>x",
    "<think>",
    "a long prompt of many letters",
]
LENGTH = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer().save_pretrained(path)
    return path


def test_the_string_is_kleins() -> None:
    whole = "<|im_start|>user\na cat<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert chat("a cat") == whole


def test_ids_mask_and_states_are_those_of_the_pipeline(folder: Path) -> None:
    """Also where the end is lost, and where marks stand in a prompt."""
    config = test_qwen3.CONFIG | {"vocab_size": 264}
    theirs, given = randomise(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**config))), {}
    theirs.register_forward_pre_hook(lambda module, args, kwargs: given.update(kwargs), with_kwargs=True)
    with torch.no_grad():
        expected = Flux2KleinPipeline._get_qwen3_prompt_embeds(
            theirs,
            Qwen2Tokenizer.from_pretrained(folder, local_files_only=True),
            PROMPTS,
            max_sequence_length=LENGTH,
            hidden_states_layers=test_qwen3.READ,
        )
    opened = open_tokenizer(folder)
    ids = chat_ids(opened, PROMPTS, LENGTH)
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, given["input_ids"])
    np.testing.assert_array_equal(before_padding(jnp.asarray(ids), opened.pad_token_id), given["attention_mask"])
    assert ids[0, -1] == opened.pad_token_id != ids[-1, -1]  # the last prompt is too long
    model = abstract(test_qwen3.small, config)
    from_torch(numpy_weights(theirs), model)
    assert_close(test_qwen3.run(model, ids, opened.pad_token_id), expected, NETWORK)


def test_the_marks_are_tokens_of_their_own_and_the_length_is_kleins(folder: Path) -> None:
    opened = open_tokenizer(folder)
    (ids,) = chat_ids(opened, [""])
    assert len(ids) == 512 and (ids == opened.pad_token_id).sum() == 512 - 25
    for mark in ("<|im_start|>", "<|im_end|>", "<think>", "</think>"):
        assert opened.convert_tokens_to_ids(mark) in ids


@pytest.mark.parametrize("length", ["512", {}, 0.5, True, 25])
def test_a_length_that_holds_no_prompt_is_refused(folder: Path, tmp_path: Path, length: Any) -> None:
    shutil.copytree(folder, tmp_path / "t")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": length}))
    with pytest.raises(UserError, match=r"t: not a tokenizer that can be read \(.*; copy the folder again"):
        open_tokenizer(tmp_path / "t")


def test_what_is_no_tokenizer_of_qwen3s_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: not a tokenizer that can be read"):
        open_tokenizer(tmp_path / "nowhere")
    Qwen2Tokenizer(vocab={"a": 0}, merges=[]).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"other: its tokenizer has no token <\|im_start\|>; expected Qwen3's"):
        open_tokenizer(tmp_path / "other")
    tokenizer(padding_side="left").save_pretrained(tmp_path / "left")
    with pytest.raises(UserError, match="left: its tokenizer pads on the left; expected on the right"):
        open_tokenizer(tmp_path / "left")
