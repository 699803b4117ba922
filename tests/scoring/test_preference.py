"""The scorer against transformers' CLIPModel and its image processor."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor
from transformers import CLIPModel as TorchCLIP

from hgdpo_jax.models.preprocessing import clip_pixels
from hgdpo_jax.scoring.preference import Scorer
from tests import tiny
from tests.rounding import NETWORK, assert_close


def test_preprocessing_is_that_of_the_image_processor() -> None:
    # Within 0…255 after each pass: the processor cuts off between its two passes, this port after both.
    noise = np.random.default_rng(0).uniform(60, 190, (8, 6, 3)).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(noise).resize((72, 96), Image.Resampling.BILINEAR))
    size = {"shortest_edge": 32}
    processor = CLIPImageProcessor(size=size, crop_size={"height": 32, "width": 32})
    expected = processor(Image.fromarray(smooth), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    found = np.asarray(clip_pixels(jnp.asarray(smooth[None] / 127.5 - 1.0), 32))[0]
    assert np.abs(found - expected).max() < 0.02  # the processor rounds to 8 bits: half a step is 0.0075


def test_score_is_the_scaled_cosine_of_transformers(tmp_path: Path) -> None:
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    torch.manual_seed(0)
    text = {**tower, "eos_token_id": 49407, "bos_token_id": 49406}
    vision = {**tower, "image_size": 32, "patch_size": 8}
    theirs = TorchCLIP(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    theirs.save_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (3, 32, 32, 3)).astype(np.float32)
    ids = np.full((3, 77), 49407, np.int32)
    ids[:, 0], ids[:, 1:5] = 49406, rng.integers(0, 49000, (3, 4))
    pixels = torch.tensor(np.asarray(clip_pixels(jnp.asarray(images), 32))).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = theirs(torch.tensor(ids).long(), pixels).logits_per_image.diag()
    found = Scorer(tmp_path, tiny.mesh())(jnp.asarray(images), jnp.asarray(ids))
    assert_close(found.score, expected, NETWORK, size=theirs.logit_scale.exp().item())  # which multiplies the cosine
    assert found.embedding.shape == (3, 8)
