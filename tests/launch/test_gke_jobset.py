"""launch/gke_jobset.yaml."""

import re
from pathlib import Path

from hgdpo_jax.run.lifecycle import EXIT_CODES, GRACE, START_AGAIN
from hgdpo_jax.training.watchdog import Collapse

JOBSET = Path(__file__).parents[2] / "launch" / "gke_jobset.yaml"


def test_all_exit_codes_end_the_set_but_that_which_goes_on() -> None:
    """1 is a mistake and 2 an argument that cannot be read."""
    (policy,) = re.findall(r"podFailurePolicy:\n(.*?)\n +template:", JOBSET.read_text(), re.DOTALL)
    (action,), (codes,) = re.findall(r"action: (\w+)", policy), re.findall(r"values: \[(.*)\]", policy)
    assert action == "FailJob" and "operator: In\n" in policy
    assert {*map(int, codes.split(","))} == {1, 2, Collapse.code, *EXIT_CODES.values()} - {START_AGAIN}


def test_hosts_have_longer_than_a_training_takes_to_save() -> None:
    (seconds,) = re.findall(r"terminationGracePeriodSeconds: (\d+)", JOBSET.read_text())
    assert int(seconds) >= GRACE + 30
