"""launch/slurm.sh with stand-ins of srun and scontrol."""

import re
from pathlib import Path

import pytest

from hgdpo_jax.run.lifecycle import GRACE, START_AGAIN
from tests.launch.stand_in import StandIns

SCRIPT = Path(__file__).parents[2] / "launch" / "slurm.sh"
COMMAND = ["python", "-m", "hgdpo_jax.main", "--workdir", "two words", "$HOME"]


@pytest.fixture
def cluster(tmp_path: Path) -> StandIns:
    srun = 'echo "$HGDPO_DISTRIBUTED" > "$STAND_INS/distributed"; exit "$(next_line ends)"'
    return StandIns(tmp_path / "cluster", {"srun": srun, "scontrol": ""})


@pytest.mark.parametrize("code", [0, 1, 2, START_AGAIN, 130, 134, 137, 139, 143, 253])
def test_the_job_ends_as_its_command_and_is_queued_again_where_that_goes_on(code: int, cluster: StandIns) -> None:
    cluster.tell("ends", [str(code)])
    assert cluster.run(SCRIPT, *COMMAND, SLURM_JOB_ID="4711").returncode == code
    assert cluster.calls("srun") == [["srun", *COMMAND]]
    assert (cluster.folder / "distributed").read_text() == "1\n"
    again = code in (START_AGAIN, 134, 137, 139, 253)  # aborted, killed, crashed, or a node was lost
    assert cluster.calls("scontrol") == [["scontrol", "requeue", "4711"]] * again


@pytest.mark.parametrize("code", [START_AGAIN, 137])
@pytest.mark.parametrize(
    ("before", "line"), [("0", "1 of 100"), ("99", "100 of 100"), ("100", "not once more"), ("250", "not once")]
)
def test_it_is_queued_again_a_hundred_times(code: int, before: str, line: str, cluster: StandIns) -> None:
    cluster.tell("ends", [str(code)])
    ended = cluster.run(SCRIPT, *COMMAND, SLURM_JOB_ID="4711", SLURM_RESTART_COUNT=before)
    assert ended.returncode == code and line in ended.stderr
    assert len(cluster.calls("scontrol")) == (int(before) < 100)


def test_a_job_without_a_command_is_refused(cluster: StandIns) -> None:
    ended = cluster.run(SCRIPT, SLURM_JOB_ID="4711")
    assert ended.returncode == 2 and ended.stderr.startswith("what is to run?") and cluster.calls() == []


def test_the_signal_comes_before_a_training_is_to_have_saved() -> None:
    (seconds,) = re.findall(r"#SBATCH --signal=TERM@(\d+)", SCRIPT.read_text())
    assert int(seconds) >= GRACE + 30
