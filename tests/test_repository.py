"""Promises about the repository itself."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent

IMPORT_ALL = """
import sys
sys.modules.update(dict.fromkeys(("torch", "diffusers", "peft")))
import importlib, pkgutil
import hgdpo_jax
def fail(name):
    raise
names = [module.name for module in pkgutil.walk_packages(hgdpo_jax.__path__, "hgdpo_jax.", fail)]
for name in names:
    importlib.import_module(name)
print(*names)
"""


def test_everything_imports_where_there_is_no_torch() -> None:
    """A TPU VM has none. That nothing imports it later is seen where the commands run, in tests/processes."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    package = ROOT / "hgdpo_jax"
    files = {path.relative_to(ROOT).with_suffix("") for path in package.glob("[!a]*/**/*.py")}  # assets/ are data
    assert {".".join(file.parts).removesuffix(".__init__") for file in files} <= {*done.stdout.split()}


def test_no_module_reads_pickles() -> None:
    """They run what is in them."""
    for path in (ROOT / "hgdpo_jax").rglob("*.py"):
        assert not re.search(r"\b(import|from) pickle\b|allow_pickle=True", path.read_text()), path


def test_assertions_tell_types_and_guard_nothing() -> None:
    """`python -O` leaves them out."""
    for path in (ROOT / "hgdpo_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Assert):
                said = re.sub(r"[\w.]+( is not None)?( and (?=\w))?", "", ast.unparse(node.test))
                assert said == "", f"{path}:{node.lineno}"


@pytest.mark.parametrize("pins", ["requirements.txt", "requirements-test.txt"])
def test_pins_are_the_lowest_of_the_ranges(pins: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = project["dependencies"] if pins == "requirements.txt" else project["optional-dependencies"]["test"]
    lowest = {r.name: s.version for r in map(Requirement, ranges) for s in r.specifier if s.operator == ">="}
    lines = [line for line in (ROOT / pins).read_text().splitlines() if not line.startswith(("#", "-r"))]
    assert lowest == dict(line.split("==") for line in lines)
