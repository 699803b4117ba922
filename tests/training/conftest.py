"""What the training tests share."""

from pathlib import Path

import pytest

from tests import tiny


@pytest.fixture(scope="session")
def base(one_level: Path) -> Path:
    """The smaller ε_base."""
    return one_level


@pytest.fixture(scope="session")
def two_levels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The larger one."""
    return tiny.write_base(tmp_path_factory.mktemp("two_levels"))
