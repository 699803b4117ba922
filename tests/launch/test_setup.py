"""launch/setup.sh and launch/curriculum.sh, with stand-ins of python and venv."""

import shutil
from pathlib import Path

import pytest

from tests.launch.stand_in import StandIns

LAUNCH = Path(__file__).parents[2] / "launch"
# The active environment: -c asks what it has, -m is a command or makes an environment.
PYTHON = """
case $1 in
  -c)
    case $2 in
      *default_backend*) [ -e "$STAND_INS/accelerator" ] || { echo "JAX finds no GPU or TPU" >&2; exit 1; } ;;
      *"import hgdpo_jax"*) [ ! -e "$STAND_INS/broken" ] || { echo "No module named flax" >&2; exit 1; } ;;
      *metadata*) [ -e "$STAND_INS/installed" ] ;;
    esac ;;
  -m) printf '%s|%s' "$PWD" "$PYTHONPATH" > "$STAND_INS/place" ;;
esac
"""
STAGES = ["stage1", "stage1", "stage2", "stage2", "stage3", "stage3", "text_encoder"]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "the repository"
    shutil.copytree(LAUNCH, root / "launch")
    for name in ("requirements.txt", "requirements-test.txt"):
        (root / name).touch()
    return root


@pytest.fixture
def shell(tmp_path: Path) -> StandIns:
    return StandIns(tmp_path / "shell", {"python": PYTHON, "python3.11": PYTHON})


def commands(shell: StandIns) -> list[list[str]]:
    """Arguments of the package's commands, in turn."""
    return [call[2:] for call in shell.calls("python") if call[1:2] == ["-m"] and call[2].startswith("hgdpo_jax.")]


@pytest.mark.parametrize("workdir", ["runs/mine", "my run", "."])
def test_a_curriculum_stays_in_the_callers_folder(
    workdir: str, repository: Path, shell: StandIns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    script, own = repository / "launch" / "curriculum.sh", ("--browse", "--config.x=1")
    done = shell.run(script, "portraits", workdir, *own, VIRTUAL_ENV="here")
    assert done.returncode == 0, done.stderr
    assert (shell.folder / "place").read_text() == f"{here}|{repository}"
    found = commands(shell)
    assert [call[2] for call in found] == [f"configs/{stage}.py:portraits" for stage in STAGES]
    assert all(call[3:6] == ["--workdir", workdir, "--config.x=1"] for call in found)
    assert [call[0] for call in found if "--browse" in call] == ["hgdpo_jax.pairs"] * 3
    assert not list(here.iterdir()) and not (repository / ".venv").exists()


def test_flow_models_have_no_text_encoder_stage(repository: Path, shell: StandIns) -> None:
    done = shell.run(repository / "launch" / "curriculum.sh", "portraits-flow", "W", VIRTUAL_ENV="here")
    assert done.returncode == 0, done.stderr
    assert [call[2] for call in commands(shell)] == [f"configs/{stage}.py:portraits-flow" for stage in STAGES[:-1]]


@pytest.mark.parametrize("environment", [{"VIRTUAL_ENV": "here"}, {"VIRTUAL_ENV": "", "CONDA_PREFIX": ""}])
@pytest.mark.parametrize("variant", ["sd15", "sdxl"])
def test_a_large_model_is_not_left_to_a_processor_without_a_word(
    variant: str, environment: dict[str, str], repository: Path, shell: StandIns
) -> None:
    script = repository / "launch" / "curriculum.sh"
    done = shell.run(script, variant, "W", JAX_PLATFORMS="", **environment)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(f"{variant} needs a GPU or a TPU: activate")
    assert commands(shell) == [] and not (repository / ".venv").exists()
    environment["VIRTUAL_ENV"] = "here"
    assert shell.run(script, variant, "W", JAX_PLATFORMS="cpu", **environment).returncode == 0
    (shell.folder / "accelerator").touch()
    assert shell.run(script, variant, "W", JAX_PLATFORMS="", **environment).returncode == 0
    assert len(commands(shell)) == 2 * len(STAGES)


def test_portraits_run_on_a_processor_in_an_environment_made_for_them(repository: Path, shell: StandIns) -> None:
    (shell.folder / "broken").touch()
    done = shell.run(repository / "launch" / "demo.sh", "W", VIRTUAL_ENV="here", JAX_PLATFORMS="")
    assert "is not used: No module named flax" in done.stderr
    made = [call for call in shell.calls("python3.11") if call[1:3] == ["-m", "venv"]]
    assert made == [["python3.11", "-m", "venv", "--clear", str(repository / ".venv")]]
