"""Settings that may change while a stage is trained, and which of them to change where it goes wrong.

`main --resume-with train.lr,train.beta` goes on from a checkpoint that was made with other values of these two. The
checkpoints that follow say which changed, from what to what, and after which step.
"""

from collections.abc import Sequence
from typing import Any

from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.provenance import MadeFrom, differences

FLAG = "--resume-with"
# They fit the same state, and each step is as good under the new value as under the old.
CHANGEABLE = ("model.dtype", "train.beta", "train.clip_norm", "train.lr", "train.schedule", "train.steps",
              "train.warmup")  # fmt: skip
# Where a loss, a gradient or the policy runs away. A larger β holds the policy nearer to the reference.
CALMER = (
    "a lower --config.train.lr, a larger --config.train.beta, a smaller --config.train.clip_norm or, where it is "
    "float16, --config.model.dtype=bfloat16"
)
GO_ON = f"run again with {CALMER}, and {FLAG} with the settings that you change"

Changes = dict[str, list[Any]]  # setting → [before, now]


def changeable(text: str) -> tuple[str, ...]:
    """The settings that a command line lists, with commas between.

    Raises:
        UserError: one may not change, or there is none.
    """
    keys = tuple(key.strip().removeprefix("--").removeprefix("config.") for key in text.split(","))
    for key in keys:
        if key not in CHANGEABLE:
            raise UserError(f"argument {FLAG} {text}: expects some of {','.join(CHANGEABLE)}")
    return keys


def changes(found: MadeFrom, wanted: MadeFrom, may_change: Sequence[str], what: str) -> Changes:
    """What differs between a checkpoint and the run that goes on from it.

    Args:
        found, wanted: what the checkpoint was made from, and what those to come will be.
        may_change: settings, of :data:`CHANGEABLE`.
        what: names the checkpoint.

    Raises:
        UserError: something else differs.
    """
    different = differences(found, wanted)
    # The length of a run counts for the cosine alone, so it comes and goes with it.
    with_schedule = ("train.steps",) if any(d.key == "train.schedule" for d in different) else ()
    for difference in different:
        if difference.key in may_change or ("train.schedule" in may_change and difference.key in with_schedule):
            continue
        remedy = "use that, or another --workdir"
        if difference.key in CHANGEABLE:
            remedy = f"use that, another --workdir, or go on with it by {FLAG} {difference.key}"
        raise UserError(difference.line(what, remedy))
    return {d.key: [d.was, d.now] for d in different}
