"""The checks of full_size.py on the same architectures at a fraction of the width."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from hgdpo_jax.diffusion import pipeline as pipelines
from hgdpo_jax.models import architectures
from hgdpo_jax.models.architectures import SD15, SDXL, Architecture
from hgdpo_jax.models.weights import Weights, open_folder
from hgdpo_jax.results import exported
from tests.full import checks
from tests.full.components import shrunken, write_folder

BOTH = pytest.mark.parametrize("architecture", [SD15, SDXL], ids=["sd15", "sdxl"])


@pytest.mark.parametrize(
    ("architecture", "part"), [(SD15, part) for part in SD15.configs] + [(SDXL, part) for part in SDXL.configs]
)
def test_each_model_computes_what_pytorchs_does(architecture: Architecture, part: str, tmp_path: Path) -> None:
    assert checks.largest_error(part, shrunken(architecture)[part], tmp_path) <= 1e-4


@BOTH
def test_a_single_file_becomes_what_diffusers_makes_of_it_bit_for_bit(
    architecture: Architecture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = shrunken(architecture)
    write_folder(architecture, configs, tmp_path / "base")
    small = replace(architecture, configs=configs)
    monkeypatch.setattr(architectures, "SDXL" if "text_encoder_2" in configs else "SD15", small)
    assert checks.unequal_keys(configs, tmp_path / "base", tmp_path, np.float32) == []


@BOTH
def test_a_checkpoint_that_is_written_becomes_in_diffusers_what_it_was_made_of(
    architecture: Architecture, tmp_path: Path
) -> None:
    write_folder(architecture, shrunken(architecture), tmp_path / "base")
    exported.write_checkpoint(pipelines.load_pipeline(tmp_path / "base"), tmp_path / "one.safetensors", "a title")
    kind = StableDiffusionXLPipeline if architecture is SDXL else StableDiffusionPipeline
    settings = {"config": str(tmp_path / "base"), "local_files_only": True, "dtype": torch.float32}
    found = kind.from_single_file(str(tmp_path / "one.safetensors"), **settings)
    for part in architecture.configs:
        expected = {k: v for k, v in open_folder(tmp_path / "base" / part).items() if "position_ids" not in k}
        theirs = {k: v.numpy() for k, v in getattr(found, part).state_dict().items() if "position_ids" not in k}
        assert len(expected) == len(theirs) > 30
        assert all(np.array_equal(theirs[key], value) for key, value in expected.items())
    metadata = Weights(tmp_path / "one.safetensors").metadata
    name = "stable-diffusion-xl-v1-base" if architecture is SDXL else "stable-diffusion-v1"
    assert metadata["modelspec.architecture"] == name and metadata["modelspec.title"] == "a title"
    assert metadata["modelspec.prediction_type"] == "epsilon"


def test_a_checkpoint_says_that_it_predicts_v(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = shrunken(SD15)
    monkeypatch.setattr(architectures, "SD15", replace(SD15, configs=configs))
    v = replace(SD15, scheduler=SD15.scheduler | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True})
    write_folder(v, configs, tmp_path / "base")
    exported.write_checkpoint(pipelines.load_pipeline(tmp_path / "base"), tmp_path / "one.safetensors", "a title")
    found = pipelines.load_pipeline(tmp_path / "one.safetensors")
    assert found.schedule.prediction_type == "v_prediction" and found.schedule.alphas_cumprod[-1] == 0
