"""Stops a training that collapses, and keeps the last good checkpoint.

Each look at held-out pairs, every `train.eval_every` steps, is good or gives an alarm. After `train.alarms` alarms in a
row the training ends with exit code 3; what it saved after the last good look is taken away, so that the same command,
with calmer settings, goes on from before. All is read from the log: a training that was killed counts on.
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hgdpo_jax.run import processes
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.training import metrics
from hgdpo_jax.training.changes import GO_ON
from hgdpo_jax.training.metrics import FACES, HELDOUT_LOSSES, Line

if TYPE_CHECKING:
    from hgdpo_jax.training.checkpoints import Checkpoints

# Of the demo: its normal stage, whose pictures are good, ends at 1.9 times its lowest held-out loss, with 1.23 times
# the reference's error; its naive run, whose pictures are not, with twice that error.
RISEN = 3.0  # times the lowest held-out loss, and above the first
UNLEARNT = 1.5  # the winner's error, times the reference's
# −log σ(z) is flat beyond z = 10; whole stages end with means below 50.
EXPLODED = 100.0
LOST = 0.5  # of the faces in the first look


class Collapse(UserError):
    """The watchdog stopped a training."""

    code = 3


class Watch(NamedTuple):
    """What the looks say.

    Attributes:
        good: the step of the newest good look; None where there is none.
        alarms: step and reasons of each look since.
    """

    good: int | None
    alarms: Sequence[tuple[int, str]]


def reasons(looks: Sequence[Line]) -> str:
    """Why the last of some looks gives an alarm; nothing where it is good."""
    first, last = looks[0], looks[-1]
    found = []
    for name in HELDOUT_LOSSES[::-1]:
        if name in last:
            lowest = min(line.get(name, math.inf) for line in looks)
            if last[name] > max(RISEN * lowest, first.get(name, math.inf)):
                found.append(f"the held-out loss rose from {lowest:.3g} to {last[name]:.3g}")
            break
    usual = last.get("heldout/error/winner_reference", first.get("heldout/error/winner", 1.0))
    ratio = last.get("heldout/error/winner", 0.0) / max(usual, 1e-12)
    if ratio > UNLEARNT:
        found.append(f"the winner's error is {ratio:.2f} times the reference's")
    margin = last.get("heldout/dpo/margin", 0.0)
    if abs(margin) > EXPLODED and "heldout/error/winner_reference" in last:  # MaPO's is of errors, and may begin there
        found.append(f"the margin is {margin:.0f}")
    faces, before = last.get(FACES, 1.0), first.get(FACES, 0.0)
    if before >= 0.5 and faces < LOST * before:
        found.append(f"faces are found in {faces:.0%} of the pictures, at first in {before:.0%}")
    return ", ".join(found)


def watch(log: Sequence[Line]) -> Watch:
    """What the looks of a log say, see :func:`hgdpo_jax.training.metrics.read`."""
    looks = [line for line in log if any(name in line for name in HELDOUT_LOSSES)]
    good: int | None = None
    alarms: list[tuple[int, str]] = []
    for i, line in enumerate(looks):
        why, step = reasons(looks[: i + 1]), int(line["step"])
        good, alarms = (good, [*alarms, (step, why)]) if why else (step, [])
    return Watch(good, alarms)


def heed(logs: Path, checkpoints: "Checkpoints", patience: int) -> None:
    """Ends a training that collapses; warns of each alarm before that.

    Args:
        logs: of the stage.
        checkpoints: of the stage.
        patience: `train.alarms`; 0: it goes on.

    Raises:
        Collapse: so many looks in a row gave an alarm.
    """
    found = Watch(*processes.broadcast(lambda: watch(metrics.read(logs))))
    if not patience or not found.alarms:
        return
    step, why = found.alarms[-1]
    if len(found.alarms) < patience:
        logging.warning("step %d: %s; that is alarm %d of %d in a row, after which training stops", step, why,
                        len(found.alarms), patience)  # fmt: skip
        return
    checkpoints.wait()
    kept = checkpoints.go_back(found.good or 0)
    raise Collapse(f"step {step}: {why}; {len(found.alarms)} looks in a row gave an alarm, the first at step "
                   f"{found.alarms[0][0]}. The training goes back to "
                   f"{f'its checkpoint of step {kept}' if kept else 'its beginning'}; {GO_ON}")  # fmt: skip
