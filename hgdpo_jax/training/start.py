"""Where a stage's training begins: at its predecessor's policy, or at its own newest checkpoint."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from hgdpo_jax import config as configuration
from hgdpo_jax.devices.sharding import tree_shardings
from hgdpo_jax.devices.transfer import place
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.training.changes import FLAG, changes
from hgdpo_jax.training.checkpoints import Checkpoints, tree_hash
from hgdpo_jax.training.finished import BASE, finished_policy, require_base
from hgdpo_jax.training.inputs import Inputs
from hgdpo_jax.training.step import Params, TrainState, init_state


class Start(NamedTuple):
    """Where a training begins.

    Attributes:
        state: of the policy.
        reference: {} where the objective has none.
        reference_hash: its hash.
        position: how many examples were drawn.
        changes: settings that changed on the way, in order: `{"step": after which, setting: [before, now], …}`.
    """

    state: TrainState
    reference: Params
    reference_hash: str
    position: int
    changes: Sequence[dict[str, Any]] = ()


def start(
    config: ConfigDict, workdir: Path, inputs: Inputs, checkpoints: Checkpoints, may_change: Sequence[str] = ()
) -> Start:
    """The start of a stage, or where it goes on.

    Args:
        config, inputs, checkpoints: of the stage.
        workdir: of the run.
        may_change: settings that may have changed since its checkpoint was written.

    Raises:
        UserError: the predecessor is not finished or has another base; the checkpoint was made from something else.
    """
    newest = checkpoints.latest()
    if newest is None:
        return _first_start(config, workdir, inputs, checkpoints)
    return _resumed(config, inputs, checkpoints, newest, may_change)


def shardings(config: ConfigDict, inputs: Inputs) -> TrainState:
    """Where each part of the state lies."""
    return tree_shardings(jax.eval_shape(_init(config, inputs), inputs.policy), inputs.mesh)


def _init(config: ConfigDict, inputs: Inputs) -> Callable[[Params], TrainState]:
    return lambda policy: init_state(policy, inputs.optimizer, config.train.ema, config.train.auto_beta)


def _first_start(config: ConfigDict, workdir: Path, inputs: Inputs, checkpoints: Checkpoints) -> Start:
    train, base = config.train, inputs.policy
    policy = base
    if train.start != "base":
        require_base(workdir, train.start, inputs.made_from[BASE])
        policy = finished_policy(workdir, train.start, base, config)
    state = jax.jit(_init(config, inputs), out_shardings=shardings(config, inputs))(policy)
    if not configuration.has_reference(config):
        return Start(state, {}, "", 0)
    reference = policy if train.reference == "start" else base
    return Start(state, reference, checkpoints.save_reference(reference), 0)


def _resumed(
    config: ConfigDict, inputs: Inputs, checkpoints: Checkpoints, step: int, may_change: Sequence[str]
) -> Start:
    """The state is restored from shapes, so that it is never in memory twice."""
    meta = checkpoints.meta(step)
    what = f"the checkpoint in {checkpoints.folder}"
    changed = changes(meta["made_from"], inputs.made_from, may_change, what)
    if changed and step >= config.train.steps:
        raise UserError(f"argument {FLAG} {','.join(changed)}: {config.stage} stands at step {step} of "
                        f"{config.train.steps}, there is none to go on with")  # fmt: skip
    print(f"{config.stage}: goes on from step {step}")
    for key, (was, now) in changed.items():
        print(f"{config.stage}: goes on with {key}={now}, which was {was}")
    history = [*meta.get("changes", []), *([{"step": step, **changed}] if changed else [])]
    reference: Any = {}
    if configuration.has_reference(config):
        reference = checkpoints.restore_reference(inputs.policy, meta["reference"])
        if tree_hash(inputs.policy) == meta["reference"]:
            reference = inputs.policy  # one copy is enough
    empty = place(jax.eval_shape(_init(config, inputs), inputs.policy), shardings(config, inputs))
    return Start(checkpoints.restore(step, empty), reference, meta["reference"], meta["position"], history)
