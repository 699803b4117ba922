"""Stable Diffusion 1.5 and XL at full size against diffusers, float32: `bash launch/test.sh --full`.

Takes about 24 GB of memory and 40 GB of disk, and on two cores about ten minutes.
"""

from pathlib import Path

import numpy as np
import pytest

from hgdpo_jax.models.architectures import SD15, SDXL, Architecture
from tests.full import checks
from tests.full.components import write_folder


@pytest.mark.parametrize(
    ("architecture", "part"),
    [(SD15, "unet"), (SD15, "vae"), (SD15, "text_encoder"), (SDXL, "text_encoder_2"), (SDXL, "unet")],
)
def test_each_model_computes_what_pytorchs_does(architecture: Architecture, part: str, tmp_path: Path) -> None:
    config = {**architecture.configs[part], "sample_size": 512 if part == "vae" else 64}
    error = checks.largest_error(part, config, tmp_path)
    print(f"\n{architecture.name}, {part}: largest error {error:.2e} standard deviations")
    assert error <= 1e-4


@pytest.mark.parametrize(("architecture", "dtype"), [(SD15, np.float32), (SDXL, np.float16)], ids=["sd15", "sdxl"])
def test_a_single_file_becomes_what_diffusers_makes_of_it_bit_for_bit(
    architecture: Architecture, dtype: type, tmp_path: Path
) -> None:
    write_folder(architecture, architecture.configs, tmp_path / "base")
    assert checks.unequal_keys(architecture.configs, tmp_path / "base", tmp_path, dtype) == []
