"""Training of one stage, from its shards and its predecessor to its last checkpoint."""

import json
from collections import deque
from itertools import chain
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from hgdpo_jax import config as configuration
from hgdpo_jax import files, processes, runtime
from hgdpo_jax.data.loader import PairLoader
from hgdpo_jax.errors import UserError
from hgdpo_jax.files import write_json
from hgdpo_jax.training import inputs as stage_inputs
from hgdpo_jax.training import start as starts
from hgdpo_jax.training.checkpoints import Checkpoints, tree_hash
from hgdpo_jax.training.inputs import Inputs
from hgdpo_jax.training.metrics import looked
from hgdpo_jax.training.monitor import Monitor, announce, warn_of_hours
from hgdpo_jax.training.optimizer import learning_rate, numbers_of
from hgdpo_jax.training.start import Start
from hgdpo_jax.training.step import make_step

_AHEAD = 2  # steps that are given to the devices beside the one they compute: a signal need not wait for more


def train(config: ConfigDict, workdir: Path) -> None:
    """Trains `config.stage` in `workdir`, or goes on from its newest whole checkpoint.

    Raises:
        UserError: an input is missing or is not what it claims to be; a checkpoint was made from something else; a
            loss, a gradient or a parameter is NaN or infinite; another command trains the stage.
    """
    files.require_plain(workdir)
    folder, index = workdir / config.stage, runtime.index_of(workdir)
    with runtime.owned(folder):
        inputs = stage_inputs.read(config, workdir, index)
        index.save()
        checkpoints = Checkpoints(folder, config.train.checkpoints)
        _require_place(config, folder)
        start = starts.start(config, workdir, inputs, checkpoints)
        if processes.first_process():
            write_json(folder / "config.json", configuration.to_json(config))
        done = int(start.state.step)
        if done >= config.train.steps and processes.first(lambda: looked(folder / "logs", done)):
            print(f"{folder}: already trained to step {done}")
            return
        announce(config, inputs, start.state)
        with processes.stopping, checkpoints:
            _run(config, folder, inputs, start, checkpoints)
        print(f"{folder}: trained to step {config.train.steps}")


def _require_place(config: ConfigDict, folder: Path) -> None:
    """Raises UserError where a stage has begun with its checkpoints in another place, and would begin anew, or where
    nothing can be written in that place."""
    place, key = config.train.checkpoints, "train.checkpoints"
    if (folder / "config.json").is_file():
        before = configuration.from_json(json.loads((folder / "config.json").read_text())).train.checkpoints
        if before != place:
            raise UserError(f"config key {key}={place}: the checkpoints of {folder} are in {before or folder}; use "
                            "that, or another --workdir")  # fmt: skip
    if place and processes.first_process():
        files.require_writable(place, key)


def _run(config: ConfigDict, folder: Path, inputs: Inputs, start: Start, checkpoints: Checkpoints) -> None:
    """The steps that are left, with a checkpoint and a look now and then."""
    settings = config.train
    state, reference, reference_hash, position = start
    done = int(state.step)
    numbers = numbers_of(config, done)
    step = make_step(inputs.loss, inputs.optimizer, settings.accumulate, starts.shardings(config, inputs))
    mine = runtime.rows(settings.batch, inputs.mesh)
    loader = PairLoader(inputs.pairs.sources["train"], settings.batch, config.seed, position, mine)
    batches = (runtime.to_devices(batch, inputs.mesh) for batch in loader)
    first = next(batches)
    warn_of_hours(config, inputs, settings.steps - done, step, state, reference, inputs.frozen, first, numbers)
    monitor = Monitor(config, folder, inputs, reference, numbers)
    seen = processes.first(lambda: looked(folder / "logs", done))
    if not seen and (done % settings.eval_every == 0 or done >= settings.steps):
        monitor.look(state, done)  # at the start, or where a run was killed between its checkpoint and its look
    ahead: deque[jax.Array] = deque()
    silent = not processes.first_process()
    with tqdm(total=settings.steps, initial=done, desc=config.stage, unit="step", disable=silent) as bar:
        for now, batch in zip(range(done + 1, settings.steps + 1), chain([first], batches), strict=False):
            checkpoints.check()
            numbers = numbers._replace(rate=np.float32(learning_rate(settings, now - 1)))
            state, metrics = step(state, reference, inputs.frozen, batch, numbers)
            monitor.log.add(now, metrics)
            ahead.append(metrics["loss/total"])
            if len(ahead) > _AHEAD:
                ahead.popleft().block_until_ready()
            bar.update()
            last = now == settings.steps
            stop = processes.stopping.after(now)
            save = now % settings.checkpoint_every == 0 or last or stop
            if now % settings.log_every == 0 or save:
                values = monitor.log.flush(now)  # stops before what is not finite can reach a checkpoint
                monitor.watch(values, now)
                shown = {
                    "loss": f"{values['loss/total']:.4f}",
                    "pairs/s": f"{(bar.format_dict.get('rate') or 0) * settings.batch:.1f}",
                }
                if "dpo/accuracy" in values:
                    shown["accuracy"] = f"{values['dpo/accuracy']:.2f}"
                bar.set_postfix(shown)
            if save:
                meta = {
                    "config": configuration.to_json(config),
                    "position": loader.position,
                    "reference": reference_hash,
                    "made_from": inputs.made_from,
                }
                checkpoints.save(now, state, meta)
            if stop:
                processes.stopping.stop()
            if now % settings.eval_every == 0 or last:
                monitor.look(state, now)
    if config.objective == "dpo":
        assert tree_hash(reference) == reference_hash, "the reference changed during training"
