"""What the tests of planning share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def base(one_level: Path) -> Path:
    """The smaller ε_base."""
    return one_level
