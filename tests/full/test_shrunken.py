"""The checks of full_size.py on the same architectures at a fraction of the width."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hgdpo_jax.models import architectures
from hgdpo_jax.models.architectures import SD15, SDXL, Architecture
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
