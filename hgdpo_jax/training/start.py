"""Where a stage's training begins: at its predecessor's policy, or at its own newest checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from hgdpo_jax.devices.sharding import tree_shardings
from hgdpo_jax.devices.transfer import place
from hgdpo_jax.run import provenance
from hgdpo_jax.training.checkpoints import Checkpoints, tree_hash
from hgdpo_jax.training.finished import BASE, finished_policy, require_base
from hgdpo_jax.training.inputs import Inputs
from hgdpo_jax.training.step import Params, TrainState, init_state


class Start(NamedTuple):
    """The state; the reference, {} for supervised fine-tuning, and its hash; how many examples were drawn."""

    state: TrainState
    reference: Params
    reference_hash: str
    position: int


def start(config: ConfigDict, workdir: Path, inputs: Inputs, checkpoints: Checkpoints) -> Start:
    """The start of a stage, or where it goes on.

    Raises:
        UserError: the predecessor is not finished or has another base; the checkpoint was made from something else.
    """
    newest = checkpoints.latest()
    if newest is None:
        return _first_start(config, workdir, inputs, checkpoints)
    return _resumed(config, workdir, inputs, checkpoints, newest)


def shardings(config: ConfigDict, inputs: Inputs) -> TrainState:
    """Where each part of the state lies."""
    return tree_shardings(jax.eval_shape(_init(config, inputs), inputs.policy), inputs.mesh)


def _init(config: ConfigDict, inputs: Inputs) -> Callable[[Params], TrainState]:
    return lambda policy: init_state(policy, inputs.optimizer, config.train.ema)


def _first_start(config: ConfigDict, workdir: Path, inputs: Inputs, checkpoints: Checkpoints) -> Start:
    train, base = config.train, inputs.policy
    policy = base
    if train.start != "base":
        require_base(workdir, train.start, inputs.made_from[BASE])
        policy = finished_policy(workdir, train.start, base, config)
    state = jax.jit(_init(config, inputs), out_shardings=shardings(config, inputs))(policy)
    if config.objective == "sft":
        return Start(state, {}, "", 0)
    reference = policy if train.reference == "start" else base
    return Start(state, reference, checkpoints.save_reference(reference), 0)


def _resumed(config: ConfigDict, workdir: Path, inputs: Inputs, checkpoints: Checkpoints, step: int) -> Start:
    """The state is restored from shapes, so that it is never in memory twice."""
    meta = checkpoints.meta(step)
    provenance.require_same(
        meta["made_from"], inputs.made_from, f"the checkpoint in {workdir}", "use that, or another --workdir"
    )
    reference: Any = {}
    if config.objective == "dpo":
        reference = checkpoints.restore_reference(inputs.policy, meta["reference"])
        if tree_hash(inputs.policy) == meta["reference"]:
            reference = inputs.policy  # one copy is enough
    empty = place(jax.eval_shape(_init(config, inputs), inputs.policy), shardings(config, inputs))
    return Start(checkpoints.restore(step, empty), reference, meta["reference"], meta["position"])
