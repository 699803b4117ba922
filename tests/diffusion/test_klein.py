"""FLUX.2-klein: a whole pipeline against diffusers', and what does not fit together."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from hgdpo_jax.checking.models import require_samplers
from hgdpo_jax.diffusion.pipeline import load_pipeline, of_shapes
from hgdpo_jax.diffusion.sampler import Sampler
from hgdpo_jax.diffusion.source import open_source
from hgdpo_jax.models.text import of_clip
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.settings import load_config
from tests import klein, tiny
from tests.models.parity import deviations

PROMPTS, SIZE, STEPS = ["a man, smiling", ""], (32, 24), 4  # height and width
TOLERANCE = 1e-4  # of the pictures' deviation


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return klein.write(tmp_path_factory.mktemp("klein"))


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_pictures_are_those_of_diffusers(folder: Path, guidance: float) -> None:
    pipeline = load_pipeline(folder)
    assert pipeline.latent_shape(SIZE) == (8, 6, 16)
    sampler = Sampler(pipeline, tiny.mesh(), solver="euler", steps=STEPS, guidance=guidance, batch=2, seed=0)
    ids, keys = pipeline.tokenize(PROMPTS), sampler.keys("test", PROMPTS, [0, 0])
    latents = sampler.generate(ids, keys, SIZE, "")
    ours = sampler.decode(latents, "")

    noise = jax.vmap(lambda pair: jax.random.normal(pair[0], (8, 6, 16)))(jax.vmap(jax.random.split)(keys))
    theirs = klein.pipeline()
    theirs.set_progress_bar_config(disable=True)
    found = theirs(
        prompt=PROMPTS,
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        latents=torch.tensor(np.asarray(noise)).permute(0, 3, 1, 2),
        output_type="pt",
        max_sequence_length=klein.TOKENS,
        text_encoder_out_layers=klein.LAYERS,
    ).images
    expected = 2 * found.permute(0, 2, 3, 1) - 1
    assert expected.std() > 0.1 and deviations(ours, expected) < TOLERANCE


def test_scorers_read_clips_ids_behind_the_models_own(folder: Path) -> None:
    pipeline = load_pipeline(folder)
    ids = pipeline.tokenize(["a cat"])
    assert ids.shape == (1, klein.TOKENS + 77) and ids.dtype == np.int32
    assert pipeline.positions == klein.TOKENS  # as its tokenizer says
    clip = np.asarray(of_clip(jnp.asarray(ids)))
    assert clip[0, 0] == 49406 and clip[0, 3] == 49407  # begin, two words, end
    assert pipeline.count_tokens(["", "a cat"])[1] - pipeline.count_tokens(["", "a cat"])[0] == len("a cat")


def test_a_distilled_model_draws_in_few_steps_without_guidance(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    index = json.loads((folder / "model_index.json").read_text())
    (tmp_path / "model_index.json").unlink()
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"is_distilled": True}))
    base, distilled = (of_shapes(open_source(str(path))) for path in (folder, tmp_path))
    assert (base.drawing.steps, base.drawing.guidance) == (50, 4.0)
    assert (distilled.drawing.steps, distilled.drawing.guidance) == (4, 1.0)
    how: dict[str, Any] = {"solver": "euler", "steps": 4, "batch": 1, "seed": 0}
    Sampler(distilled, tiny.mesh(), guidance=1.0, **how)
    with pytest.raises(UserError, match="^guidance 4: this FLUX.2-klein is distilled and draws without; set it to 1: "):
        Sampler(distilled, tiny.mesh(), guidance=4.0, **how)
    config = load_config("configs/stage1.py:klein", ["pairs.guidance=1"])
    with pytest.raises(UserError, match="^guidance 4: this FLUX.2-klein is distilled"):  # of looks
        require_samplers(config, distilled)


@pytest.mark.parametrize("part, key, value, message", [
    ("transformer", "in_channels", 20, "takes 20 channels, patches of its VAE's latents have 16"),
    ("transformer", "joint_attention_dim", 64, "embeddings of width 96, its transformer reads 64"),
    ("text_encoder", "vocab_size", 100, "ids up to 260, the text encoder has 100 words"),
])  # fmt: skip
def test_parts_that_do_not_fit_are_refused(
    folder: Path, part: str, key: str, value: int, message: str, tmp_path: Path
) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / part).unlink()
    (tmp_path / part).mkdir()
    for path in (folder / part).iterdir():
        (tmp_path / part / path.name).symlink_to(path)
    config = json.loads((folder / part / "config.json").read_text())
    (tmp_path / part / "config.json").unlink()
    (tmp_path / part / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(UserError, match=message):
        open_source(str(tmp_path))
