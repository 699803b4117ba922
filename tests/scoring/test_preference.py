"""The scorer against transformers' CLIPModel and its image processor."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor
from transformers import CLIPModel as TorchCLIP

from hgdpo_jax.models.text import both
from hgdpo_jax.scoring.scorers import open_scorers
from tests import tiny
from tests.rounding import NETWORK, assert_close


@pytest.mark.parametrize("kind", ["PickScore", "HPSv2"])
def test_score_is_the_scaled_cosine_of_transformers(kind: str, tmp_path: Path) -> None:
    """HPSv2 has other activations, another normalisation, and a config that leaves out what transformers knows."""
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    tower |= {"hidden_act": "gelu"} if kind == "HPSv2" else {}
    torch.manual_seed(0)
    text = {**tower, "eos_token_id": 49407, "bos_token_id": 49406}
    vision = {**tower, "image_size": 32, "patch_size": 8}
    theirs = TorchCLIP(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    theirs.save_pretrained(tmp_path)
    processor = CLIPImageProcessor(size=32, crop_size=32)
    if kind == "HPSv2":
        config = json.loads((tmp_path / "config.json").read_text())
        for name in ("vocab_size", "max_position_embeddings", "eos_token_id", "layer_norm_eps"):
            config["text_config"].pop(name)
        (tmp_path / "config.json").write_text(json.dumps(config))
        processor = CLIPImageProcessor(size=32, crop_size=32, image_mean=[0.5] * 3, image_std=[0.5] * 3)
        processor.save_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
    ids = np.full((3, 77), 49407, np.int32)
    ids[:, 0], ids[:, 1:5] = 49406, rng.integers(0, 49000, (3, 4))
    pixels = torch.tensor(processor(list(images), return_tensors="np")["pixel_values"])
    with torch.no_grad():
        expected = theirs(torch.tensor(ids).long(), pixels).logits_per_image.diag()
    (scorer,) = open_scorers(str(tmp_path), tiny.mesh())
    found = scorer.judge(jnp.asarray(images / 127.5 - 1.0, jnp.float32), jnp.asarray(both(ids, ids)))
    assert_close(found.score, expected, NETWORK, size=theirs.logit_scale.exp().item())  # which multiplies the cosine
    assert found.embedding.shape == (3, 8)
