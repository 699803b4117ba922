"""launch/reproduce.sh, with a stand-in of python."""

from pathlib import Path

import pytest

from tests.launch.stand_in import StandIns

SCRIPT = Path(__file__).parents[2] / "launch" / "reproduce.sh"
PYTHON = """
case $2 in
  tools.reproduction.rows) if [ -n "${5:-}" ]; then printf '%s\\n' "$5:base" "$5:$4"; else
    [ "$4" != paper ] || echo "pairs a.py:portraits --config.x=1"; echo "main $4.py:portraits"; fi ;;
  tools.reproduction.document) echo "# page" ;;
  hgdpo_jax.main) [ ! -e "$STAND_INS/broken" ] || exit 1; exit 3 ;;
esac
"""


@pytest.fixture
def shell(tmp_path: Path) -> StandIns:
    return StandIns(tmp_path / "shell", {"python": PYTHON})


def test_each_command_runs_once_for_each_seed_and_a_stopped_reproduction_goes_on(
    shell: StandIns, tmp_path: Path
) -> None:
    """In a folder whose name has a blank. That the watchdog stopped a training is an answer, too."""
    folder, given = tmp_path / "my rows", {"VIRTUAL_ENV": "here", "SEEDS": "3 5"}
    shell.tell("broken", ["yes"])
    stopped = shell.run(SCRIPT, "sd15", str(folder), "--config.y=2", JAX_PLATFORMS="cpu", **given)
    assert stopped.returncode == 1
    (shell.folder / "broken").unlink()
    done = shell.run(SCRIPT, "sd15", str(folder), "--config.y=2", JAX_PLATFORMS="cpu", **given)
    assert done.returncode == 0, done.stderr
    assert (folder / "reproduction.md").read_text() == "# page\n"
    trained = [call[2:] for call in shell.calls("python") if call[2] in ("hgdpo_jax.pairs", "hgdpo_jax.main")]
    expected = []
    for part in ("paper", "baselines", "ablations", "objectives", "lengths"):
        for seed in "35":
            place = ["--workdir", f"{folder}/{seed}", f"--config.seed={seed}"]
            if part == "paper":
                pairs = ["--config", "a.py:portraits", *place, "--config.x=1", "--config.y=2"]
                expected.append(["hgdpo_jax.pairs", *pairs])
            main = ["--config", f"{part}.py:portraits", *place, "--config.train.alarms=0", "--config.y=2"]
            tries = 2 if (part, seed) == ("paper", "3") else 1  # the first one failed
            expected += [["hgdpo_jax.main", *main]] * tries
    assert trained == expected
    measured = [call[3:] for call in shell.calls("python") if call[2] == "hgdpo_jax.evaluate"]
    assert measured == [
        ["--runs", f"{folder}/{seed}:base", f"{folder}/{seed}:{part}", "--seeds", "4"]
        + ["--out", f"{folder}/{seed}/rows/{part}"]
        for part in ("paper", "baselines", "ablations", "objectives", "lengths")
        for seed in "35"
    ]


def test_a_part_alone_comes_after_the_three_stages(shell: StandIns, tmp_path: Path) -> None:
    given = {"VIRTUAL_ENV": "here", "SEEDS": "0", "PARTS": "lengths", "JAX_PLATFORMS": "cpu"}
    assert shell.run(SCRIPT, "sd15", str(tmp_path / "rows"), **given).returncode == 0
    trained = [call[4] for call in shell.calls("python") if call[2] in ("hgdpo_jax.pairs", "hgdpo_jax.main")]
    assert trained == ["a.py:portraits", "paper.py:portraits", "lengths.py:portraits"]
