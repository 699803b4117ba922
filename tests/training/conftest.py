"""What the training tests share."""

from pathlib import Path

import pytest

from tests import tiny


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ε_base whose UNet has one resolution: each kind of layer but those between resolutions, in half the time."""
    unet = {"block_out_channels": [8], "attention_head_dim": 2, "norm_num_groups": 4}
    unet |= {"down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"]}
    return tiny.write_base(tmp_path_factory.mktemp("base"), tiny.TINY_UNET | unet)


@pytest.fixture(scope="session")
def two_levels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with the layers between resolutions too."""
    return tiny.write_base(tmp_path_factory.mktemp("two_levels"))
