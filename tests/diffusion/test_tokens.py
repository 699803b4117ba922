"""Captions are cut into the tokens that diffusers cuts them into."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from hgdpo_jax.diffusion.pipeline import Pipeline, of_shapes
from hgdpo_jax.diffusion.source import open_source
from hgdpo_jax.models.text import both, of_first
from hgdpo_jax.run.errors import UserError
from tests import tiny

CAPTIONS = [
    "",
    "a photo of a cat, 35mm",
    "wow!! a cat!",
    "!",
    "!" * 100,
    "a <|endoftext|> cat",
    "a cat <|endoftext|>",
    "<|startoftext|> a cat",
    "<|endoftext|>" * 80,
    "a<|endoftext|>!<|startoftext|>b!c",
    "<|ENDOFTEXT|> &amp; <b>",
    " ".join(["cat"] * 74),
    " ".join(["cat"] * 75),
    " ".join(["cat"] * 76),
    " ".join(["cat!"] * 60),
    "x" * 1000,
    "  two   spaces\tand\na line ",
    "é e\u0301 ﬀ Ａ 猫 🐈\u200d⬛ \u00a0\ufeff",
    "(cat:1.3), [dog] {a|b} \\ 's 'LL",
]


def theirs(pipeline: Any, caption: str) -> list[np.ndarray]:
    """The ids that each text encoder of diffusers' pipeline gets."""
    found: list[np.ndarray] = []

    def hook(module: torch.nn.Module, given: tuple, named: dict) -> None:
        found.append((given[0] if given else named["input_ids"]).numpy())

    encoders = [pipeline.text_encoder] + ([pipeline.text_encoder_2] if hasattr(pipeline, "text_encoder_2") else [])
    hooks = [encoder.register_forward_pre_hook(hook, with_kwargs=True) for encoder in encoders]
    with torch.no_grad():
        settings = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        pipeline.encode_prompt(caption, **settings)
    for each in hooks:
        each.remove()
    return found


def of_second(pipeline: Pipeline, ids: np.ndarray) -> np.ndarray:
    return np.asarray(pipeline.text._of_second(jnp.asarray(ids)))


def test_every_caption_has_diffusers_tokens(base: Path, tmp_path: Path) -> None:
    xl = tiny.write_sdxl(tmp_path / "xl")
    single, pair = (of_shapes(open_source(str(folder))) for folder in (base, xl))
    reference, reference_xl = (DiffusionPipeline.from_pretrained(f, dtype=torch.float32) for f in (base, xl))
    ids, ids_xl = single.tokenize(CAPTIONS), pair.tokenize(CAPTIONS)
    assert ids.shape == ids_xl.shape == (len(CAPTIONS), 77)
    for i, caption in enumerate(CAPTIONS):
        (expected,), (first, second) = theirs(reference, caption), theirs(reference_xl, caption)
        assert np.array_equal(ids[i : i + 1], expected), caption
        assert np.array_equal(of_first(jnp.asarray(ids_xl[i : i + 1])), first), caption
        assert np.array_equal(of_second(pair, ids_xl[i : i + 1]), second), caption
    assert not np.array_equal(of_first(jnp.asarray(ids_xl[2:3])), of_second(pair, ids_xl[2:3]))
    assert pair.count_tokens(["!" * 100, "cat"]) == [102, 3]
    of_one = of_first(jnp.asarray(ids_xl[:2]))  # as older pairs have them: padded for the second
    assert np.array_equal(of_second(pair, of_one), of_second(pair, ids_xl[:2]))


@pytest.mark.parametrize(("shape", "high"), [((1, 76), 5), ((1, 77), 2**16), ((1, 78), 2**16 + 1)])
def test_tokenizers_that_do_not_fit_each_other_are_refused(shape: tuple, high: int) -> None:
    with pytest.raises(UserError, match="tokenizers: give 77 and"):
        both(np.zeros((1, 77), np.int32), np.full(shape, high, np.int32))
