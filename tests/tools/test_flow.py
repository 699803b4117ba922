"""The embedded flow base, a FLUX.2-klein in small: what its tool makes, and what is shipped."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from hgdpo_jax.config import ASSETS
from hgdpo_jax.data.photographs import list_photographs
from hgdpo_jax.data.pixels import load_images
from hgdpo_jax.models.chat import chat, chat_ids, open_tokenizer
from hgdpo_jax.models.convert import from_torch, load_model, to_torch
from hgdpo_jax.models.flux2_vae import AutoencoderKLFlux2
from hgdpo_jax.models.vae import AutoencoderKL
from tools.make_assets import flow

PORTRAITS = ASSETS / "portraits"
CAPTIONS = [photograph.caption for photograph in list_photographs(PORTRAITS, "train")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer, and a text encoder that has learnt for three steps."""
    folder = tmp_path_factory.mktemp("flow")
    tokenizer = flow.make_tokenizer([chat(caption) for caption in CAPTIONS], folder / "tokenizer")
    flow.make_text_encoder(CAPTIONS, tokenizer, folder / "text_encoder", 3)
    return folder


@pytest.mark.parametrize("shipped", [False, True])
def test_the_tokenizer_reads_captions_as_diffusers_does(shipped: bool, made: Path) -> None:
    """The shipped one without cutting any."""
    tokenizer = open_tokenizer((PORTRAITS / "flow" if shipped else made) / "tokenizer")
    tokens = chat_ids(tokenizer, CAPTIONS, flow.TOKENS if shipped else 2 * flow.TOKENS)
    for caption, ids in zip(CAPTIONS, tokens, strict=True):
        assert tokenizer.decode(ids[ids != tokenizer.pad_token_id]) == chat(caption)
    asked: Any = dict(tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert tokenizer.apply_chat_template([{"role": "user", "content": CAPTIONS[0]}], **asked) == chat(CAPTIONS[0])


def test_the_text_encoder_learns_by_the_loss_of_transformers(made: Path) -> None:
    theirs = transformers.Qwen3ForCausalLM.from_pretrained(made / "text_encoder", dtype=torch.float32)
    tokenizer = open_tokenizer(made / "tokenizer")
    ids = chat_ids(tokenizer, CAPTIONS[:4], flow.TOKENS)
    asked, real = torch.tensor(ids, dtype=torch.long), torch.tensor(ids != tokenizer.pad_token_id)
    with torch.no_grad():
        labels = asked.masked_fill(~real, -100)
        expected = theirs(input_ids=asked, attention_mask=real.long(), labels=labels).loss.item()
    ours = flow.language_model(len(tokenizer))
    from_torch(load_file(made / "text_encoder" / "model.safetensors"), ours)
    found = float(flow.continued(ours, jnp.asarray(ids), tokenizer.pad_token_id))
    assert abs(found - expected) < 1e-5 * expected


def test_a_fresh_transformer_predicts_nothing() -> None:
    model = flow.fresh_transformer()
    sample = jax.random.normal(jax.random.key(0), (2, 6, 6, flow.TRANSFORMER["in_channels"]))
    text = jax.random.normal(jax.random.key(1), (2, 5, flow.TRANSFORMER["joint_attention_dim"]))
    out = model(sample, jnp.array([0.2, 0.9]), model.read_text(text))
    assert out.shape == sample.shape and not np.asarray(out).any()


def test_its_vae_is_the_embedded_one_and_knows_its_latents() -> None:
    vae = load_model(AutoencoderKLFlux2, PORTRAITS / "flow" / "vae")
    other, own = to_torch(load_model(AutoencoderKL, PORTRAITS / "base" / "vae")), to_torch(vae)
    assert own.keys() - other.keys() == {"bn.running_mean", "bn.running_var", "bn.num_batches_tracked"}
    assert all(np.array_equal(own[key], value) for key, value in other.items())
    _, images = load_images(list_photographs(PORTRAITS, "train")[:32], (96, 96))
    latents = vae.to_latents(jnp.asarray(images))
    assert abs(latents.mean()) < 0.2 and 0.5 < latents.std() < 2  # of photographs; made people's are 0 and 1
