"""Promises about the repository itself."""

import ast
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from hgdpo_jax.models.weights import CONVERTER
from hgdpo_jax.results.exported import RECIPE

ROOT = Path(__file__).parent.parent
MODULES = sorted(set((ROOT / "hgdpo_jax").rglob("*.py")) - {RECIPE, CONVERTER})  # those are for where PyTorch is


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_torch_is_imported_by_no_module(path: Path) -> None:
    """A TPU VM has no torch; only the tests may import it."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported.add(node.module.split(".")[0])
    assert not imported & {"torch", "diffusers", "peft", "pickle"}


@pytest.mark.parametrize("pins", ["requirements.txt", "requirements-test.txt"])
def test_pins_are_the_lowest_of_the_ranges(pins: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = project["dependencies"] if pins == "requirements.txt" else project["optional-dependencies"]["test"]
    lowest = {r.name: s.version for r in map(Requirement, ranges) for s in r.specifier if s.operator == ">="}
    lines = [line for line in (ROOT / pins).read_text().splitlines() if not line.startswith(("#", "-r"))]
    assert lowest == dict(line.split("==") for line in lines)
