"""Training of one stage, from its shards and its predecessor to its last checkpoint."""

from collections import deque
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from hgdpo_jax import __version__
from hgdpo_jax import config as configuration
from hgdpo_jax.data.loader import PairLoader
from hgdpo_jax.data.resolutions import settled
from hgdpo_jax.devices.peaks import mesh_peak
from hgdpo_jax.devices.processor import keep_memory
from hgdpo_jax.devices.transfer import local_rows, to_devices
from hgdpo_jax.run import lifecycle, processes
from hgdpo_jax.run.buckets import require_writable
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import write_json
from hgdpo_jax.run.folder import require_plain
from hgdpo_jax.run.index import index_of_run
from hgdpo_jax.run.locks import lock_for_all
from hgdpo_jax.run.progress import Progress
from hgdpo_jax.run.settings import read_config
from hgdpo_jax.training import board, reference_cache, watchdog
from hgdpo_jax.training import inputs as stage_inputs
from hgdpo_jax.training import start as starts
from hgdpo_jax.training.board import Board
from hgdpo_jax.training.checkpoints import Checkpoints, tree_hash
from hgdpo_jax.training.inputs import Inputs
from hgdpo_jax.training.metrics import was_evaluated
from hgdpo_jax.training.monitor import Monitor, announce, warn_of_hours
from hgdpo_jax.training.optimizer import learning_rate, numbers_of
from hgdpo_jax.training.speed import Speed, remaining_steps
from hgdpo_jax.training.start import Start
from hgdpo_jax.training.step import make_step

# What is shown of a log line while a stage is trained.
_SHOWN = {
    "loss/total": "loss {:.4g}",
    "dpo/accuracy": "accuracy {:.2f}",
    "speed/pairs_per_second": "{:.3g} pairs/s",
    "speed/share_of_peak": "{:.0%} of peak",
}
_AHEAD = 2  # at most so many steps are queued behind the one being computed, so that a signal is answered soon


def train(config: ConfigDict, workdir: Path, traced: range = range(0), may_change: Sequence[str] = ()) -> None:
    """Trains `config.stage` in `workdir`, or goes on from its newest undamaged checkpoint.

    Args:
        config: of the stage.
        workdir: of the run.
        traced: steps of which a JAX trace is written into the stage's logs.
        may_change: settings that may have changed since the checkpoint was written, see
            :mod:`hgdpo_jax.training.changes`.

    Raises:
        UserError: an input is missing or is not what it claims to be; a checkpoint was made from something else; a
            loss, a gradient or a parameter is NaN or infinite; another command trains the stage; steps are to be
            traced, but none of them is still to come.
    """
    require_plain(workdir)
    config = settled(config, workdir)
    folder, index = workdir / config.stage, index_of_run(workdir)
    with lock_for_all(folder):
        inputs = stage_inputs.read(config, workdir, index)
        index.save()
        kept = config.train.keep, config.train.keep_every
        with closing(Checkpoints(folder, config.train.checkpoints, *kept)) as checkpoints:
            _require_place(config, folder)
            if traced and checkpoints.latest() is None:
                remaining_steps(traced, 0, config.train.steps)  # refused before the reference is written
            start = starts.start(config, workdir, inputs, checkpoints, may_change)
            done = int(start.state.step)
            if done >= config.train.steps and processes.broadcast(lambda: was_evaluated(folder / "logs", done)):
                _keep(config, folder)
                print(f"{folder}: already trained to step {done}")
                return
            traced = remaining_steps(traced, done, config.train.steps)
            with board.opened(config, folder) as shown:
                if config.train.reference_cache:
                    inputs = reference_cache.attach(config, folder, inputs, start, index)
                    index.save()
                _keep(config, folder)
                announce(config, inputs, start.state)
                with lifecycle.stopping, checkpoints:
                    _run(config, folder, inputs, start, checkpoints, traced, shown)
            print(f"{folder}: trained to step {config.train.steps}")


def _keep(config: ConfigDict, folder: Path) -> None:
    """Notes with which settings a stage is trained, once nothing of them can be refused."""
    if processes.is_first():
        write_json(folder / "config.json", configuration.to_json(config))


def _require_place(config: ConfigDict, folder: Path) -> None:
    """Raises UserError where the stage's checkpoints are in another place than `train.checkpoints`, and training would
    begin anew, or where nothing can be written there."""
    place, key = config.train.checkpoints, "train.checkpoints"
    if (folder / "config.json").is_file():
        before = read_config(folder / "config.json").train.checkpoints
        if before != place:
            raise UserError(f"config key {key}={place}: the checkpoints of {folder} are in {before or folder}; use "
                            "that, or another --workdir")  # fmt: skip
    if place and processes.is_first():
        require_writable(place, key)


def _run(
    config: ConfigDict,
    folder: Path,
    inputs: Inputs,
    start: Start,
    checkpoints: Checkpoints,
    traced: range,
    shown: Board | None,
) -> None:
    """The steps to go: an update of the policy each; now and then a log line, a checkpoint, an evaluation."""
    settings, mesh = config.train, inputs.mesh
    keep_memory(mesh)
    state, reference, position = start.state, start.reference, start.position
    done = int(state.step)
    numbers = numbers_of(config, done)
    update = make_step(inputs.loss, inputs.optimizer, settings.accumulate, starts.shardings(config, inputs))
    rows = local_rows(settings.batch, mesh)
    loader = PairLoader(inputs.pairs.sources["train"], settings.batch, config.seed, position, rows)
    batch = to_devices(next(loader), mesh)
    warn_of_hours(config, inputs, settings.steps - done, update, state, reference, inputs.frozen, batch, numbers)
    monitor = Monitor(config, folder, inputs, reference, numbers, done, shown)
    evaluated = processes.broadcast(lambda: was_evaluated(folder / "logs", done))
    if not evaluated and (done % settings.eval_every == 0 or done >= settings.steps):
        monitor.evaluate(state, done)  # before the first step, or where a run was killed after its checkpoint
    meta: dict[str, Any] = {"config": configuration.to_json(config), "version": __version__}
    meta |= {"reference": start.reference_hash, "made_from": inputs.made_from, "changes": list(start.changes)}
    in_flight: deque[jax.Array] = deque()
    bar = Progress(total=settings.steps, initial=done, desc=config.stage, unit="step", told=True)
    peak = mesh_peak(mesh, config.model.dtype)
    with bar, Speed(update, settings.batch, peak, traced, folder / "logs") as speed:
        for step in range(done + 1, settings.steps + 1):
            checkpoints.check()
            numbers = numbers._replace(rate=np.float32(learning_rate(settings, step - 1)))
            state, metrics = speed.step(step, state, reference, inputs.frozen, batch, numbers)
            position = loader.position  # after this step's examples; the batch fetched next is the following step's
            batch = to_devices(next(loader), mesh)
            in_flight.append(metrics["loss/total"])
            if len(in_flight) > _AHEAD:
                in_flight.popleft().block_until_ready()
            bar.update()
            monitor.log.add(step, metrics)
            last, stop = step == settings.steps, lifecycle.stopping.after(step)
            save = last or stop or step % settings.checkpoint_every == 0
            evaluate = last or step % settings.eval_every == 0
            if save or evaluate or step % settings.log_every == 0:
                values = monitor.log.means()  # stops before what is not finite can reach a checkpoint
                values |= speed.lap(settings.steps - step) | {"train/learning_rate": float(numbers.rate)}
                monitor.report(values, step)
                figures = ", ".join(form.format(values[name]) for name, form in _SHOWN.items() if name in values)
                bar.tell(figures, values.get("speed/hours_left"))
            if last and configuration.has_reference(config) and tree_hash(reference) != start.reference_hash:
                raise RuntimeError("the reference changed during training")
            if save:
                checkpoints.save(step, state, meta | {"position": position})
            if stop:
                lifecycle.stopping.stop()
            if evaluate:
                monitor.evaluate(state, step)
                watchdog.heed(folder / "logs", checkpoints, settings.alarms)
            if save or evaluate:
                speed.restart()
