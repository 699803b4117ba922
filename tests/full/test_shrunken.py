"""The checks of full_size.py on the same architectures at a fraction of the width."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from hgdpo_jax.diffusion import pipeline as pipelines
from hgdpo_jax.diffusion.source import open_source
from hgdpo_jax.models import architectures
from hgdpo_jax.models.architectures import SD15, SDXL, Architecture
from hgdpo_jax.models.weights import Weights, open_folder
from hgdpo_jax.results import exported
from tests.full import checks
from tests.full.components import shrunken, write_folder

BOTH = pytest.mark.parametrize("architecture", [SD15, SDXL], ids=["sd15", "sdxl"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name of an architecture → a diffusers folder of it."""
    folders = {x.name: tmp_path_factory.mktemp("base") for x in (SD15, SDXL)}
    for architecture in (SD15, SDXL):
        write_folder(architecture, shrunken(architecture), folders[architecture.name])
    return folders


@pytest.mark.parametrize(
    ("architecture", "part"),
    [(SD15, "vae"), (SD15, "text_encoder"), (SDXL, "text_encoder_2"), (SDXL, "unet")],  # SD15's: tests/models
    ids=["vae", "text_encoder", "text_encoder_2", "unet"],
)
def test_each_model_computes_what_pytorchs_does(architecture: Architecture, part: str, tmp_path: Path) -> None:
    assert checks.largest_error(part, shrunken(architecture)[part] | {"layers_per_block": 1}, tmp_path) <= 1e-4


@BOTH
def test_a_single_file_becomes_what_diffusers_makes_of_it_bit_for_bit(
    architecture: Architecture, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(architecture, configs=shrunken(architecture))
    monkeypatch.setattr(architectures, "SDXL" if architecture is SDXL else "SD15", small)
    assert checks.unequal_keys(small.configs, folders[architecture.name], tmp_path, np.float32) == []


@BOTH
def test_a_checkpoint_that_is_written_becomes_in_diffusers_what_it_was_made_of(
    architecture: Architecture, folders: dict[str, Path], tmp_path: Path
) -> None:
    base = folders[architecture.name]
    exported.write_checkpoint(pipelines.load_pipeline(base), tmp_path / "one.safetensors", "a title")
    kind = StableDiffusionXLPipeline if architecture is SDXL else StableDiffusionPipeline
    settings = {"config": str(base), "local_files_only": True, "dtype": torch.float32}
    found = kind.from_single_file(str(tmp_path / "one.safetensors"), **settings)
    for part in architecture.configs:
        expected = {k: v for k, v in open_folder(base / part).items() if "position_ids" not in k}
        theirs = {k: v.numpy() for k, v in getattr(found, part).state_dict().items() if "position_ids" not in k}
        assert len(expected) == len(theirs) > 30
        assert all(np.array_equal(theirs[key], value) for key, value in expected.items())
    metadata = Weights(tmp_path / "one.safetensors").metadata
    name = "stable-diffusion-xl-v1-base" if architecture is SDXL else "stable-diffusion-v1"
    assert metadata["modelspec.architecture"] == name and metadata["modelspec.title"] == "a title"
    assert metadata["modelspec.prediction_type"] == "epsilon"


def test_a_checkpoint_says_that_it_predicts_v(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(architectures, "SD15", replace(SD15, configs=shrunken(SD15)))
    base = shutil.copytree(folders[SD15.name], tmp_path / "base")
    scheduler = {**SD15.scheduler, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    (base / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    exported.write_checkpoint(pipelines.load_pipeline(base), tmp_path / "one.safetensors", "a title")
    found = open_source(str(tmp_path / "one.safetensors")).scheduler
    assert found["prediction_type"] == "v_prediction" and found["rescale_betas_zero_snr"]
