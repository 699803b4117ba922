"""launch/slurm.sh with stand-ins of srun and scontrol."""

from pathlib import Path

import pytest

from hgdpo_jax.run.lifecycle import START_AGAIN
from tests.launch.stand_in import StandIns

SCRIPT = Path(__file__).parents[2] / "launch" / "slurm.sh"
COMMAND = ["python", "-m", "hgdpo_jax.main", "--workdir", "two words", "$HOME"]


@pytest.fixture
def cluster(tmp_path: Path) -> StandIns:
    srun = 'echo "$HGDPO_DISTRIBUTED" > "$STAND_INS/distributed"; exit "$(next_line ends)"'
    return StandIns(tmp_path / "cluster", {"srun": srun, "scontrol": ""})


@pytest.mark.parametrize("code", [0, 1, 2, START_AGAIN, 130, 137])
def test_the_job_ends_as_its_command_and_is_queued_again_where_that_goes_on(code: int, cluster: StandIns) -> None:
    cluster.tell("ends", [str(code)])
    assert cluster.run(SCRIPT, *COMMAND, SLURM_JOB_ID="4711").returncode == code
    assert cluster.calls("srun") == [["srun", *COMMAND]]
    assert (cluster.folder / "distributed").read_text() == "1\n"
    assert cluster.calls("scontrol") == [["scontrol", "requeue", "4711"]] * (code == START_AGAIN)


def test_a_job_without_a_command_is_refused(cluster: StandIns) -> None:
    ended = cluster.run(SCRIPT, SLURM_JOB_ID="4711")
    assert ended.returncode == 2 and ended.stderr.startswith("what is to run?") and cluster.calls() == []
