"""What pip installs, by what pyproject.toml lists: nothing is built."""

import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from hgdpo_jax.models.weights import CONVERTER
from hgdpo_jax.results.report import TEMPLATE
from hgdpo_jax.run.settings import CONFIGS

ROOT = Path(__file__).parents[2]
SHIPPED_ELSEWHERE = {"hgdpo_jax.configs": "configs", "hgdpo_jax.tools": "tools"}  # package → folder of the repository
INSIDE = {f"hgdpo_jax.configs.{name}": f"configs/{name}" for name in ("ablations", "baselines")}  # which follow


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def shipped() -> set[Path]:
    """Every file of a wheel, as pyproject.toml lists them, where it lies in the repository."""
    setuptools, found = PROJECT["tool"]["setuptools"], set()
    for package in setuptools["packages"]:
        folder = ROOT / (setuptools["package-dir"] | INSIDE).get(package, package.replace(".", "/"))
        for pattern in ("*.py", *setuptools["package-data"].get(package, ())):
            found |= {path for path in folder.glob(pattern) if path.is_file()}
    return found | {path for pattern in PROJECT["project"]["license-files"] for path in ROOT.glob(pattern)}


def test_every_folder_with_python_files_is_a_package() -> None:
    listed = PROJECT["tool"]["setuptools"]
    folders = {path.parent for path in (ROOT / "hgdpo_jax").rglob("*.py")} - {ROOT / "hgdpo_jax" / "assets"}
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders} | {*SHIPPED_ELSEWHERE, *INSIDE}
    assert sorted(listed["packages"]) == sorted(packages) and listed["package-dir"] == SHIPPED_ELSEWHERE
    assert all((folder / "__init__.py").is_file() for folder in folders)


def test_configs_data_licences_and_types_are_shipped() -> None:
    files = [*CONFIGS.rglob("*.py"), CONVERTER, TEMPLATE, ROOT / "hgdpo_jax" / "py.typed", ROOT / "LICENSE"]
    for folder in ("hgdpo_jax/assets", "licenses"):
        files += [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert len(files) > 100 and not set(files) - shipped()


@pytest.mark.parametrize("name", ["pairs", "train", "sample", "evaluate", "export", "plan", "browse"])
def test_each_command_runs_what_its_module_does(name: str) -> None:
    scripts = PROJECT["project"]["scripts"]
    module, _, function = scripts[f"hgdpo-{name}"].partition(":")
    assert module == f"hgdpo_jax.{'main' if name == 'train' else name}" and len(scripts) == 7
    assert callable(getattr(import_module(module), function))
