"""What people see of a training: lines at the start, the log, held-out pairs, pictures, and warnings."""

import logging
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from hgdpo_jax import config as configuration
from hgdpo_jax.data.loader import FirstBatches, first_records
from hgdpo_jax.devices.mesh import describe_mesh
from hgdpo_jax.devices.peaks import CORE, mesh_peak
from hgdpo_jax.devices.random import stream_key
from hgdpo_jax.devices.sharding import batch_sharding, path_name, replicated
from hgdpo_jax.devices.transfer import local_rows, place, to_devices
from hgdpo_jax.diffusion.sampler import Sampler
from hgdpo_jax.faces.detection import FaceDetector
from hgdpo_jax.models.text import KeptText
from hgdpo_jax.pictures.write import grid
from hgdpo_jax.run.progress import say
from hgdpo_jax.training.board import Board
from hgdpo_jax.training.changes import CALMER
from hgdpo_jax.training.cost import operations
from hgdpo_jax.training.inputs import Inputs
from hgdpo_jax.training.metrics import FACES, PROMPTS, SAMPLES, SHOWN, MetricLog, average
from hgdpo_jax.training.optimizer import first_step
from hgdpo_jax.training.prompts import Prompts
from hgdpo_jax.training.step import Metrics, Numbers, Params, TrainState

HELDOUT_PAIRS = 256
# A policy that learns makes the winner's error no larger than the reference's by more than a few parts in a hundred.
UNLEARNING = 1.2
# What is said of a look.
_SAID = {
    "heldout/loss/total": "held-out loss {:.4g}",
    "heldout/dpo/accuracy": "accuracy {:.2f}",
    FACES: "faces in {:.0%}",
}
_NOISY = 8  # held-out batches
_LARGE = 2e8  # parameters; the UNets of SD1.5 and XL have 0.9e9 and 2.6e9


class Monitor:
    """Evaluates a stage while it is trained, and writes its log.

    Args:
        config, inputs, reference: of the stage.
        folder: W/stageN.
        numbers: of the stage; the rate does not count.
        done: the step that the training goes on from.
        board: of W&B, if any.
    """

    def __init__(
        self,
        config: ConfigDict,
        folder: Path,
        inputs: Inputs,
        reference: Params,
        numbers: Numbers,
        done: int,
        board: Board | None = None,
    ) -> None:
        self.log, self._samples = MetricLog(folder / "logs", done, board), folder / "logs" / SAMPLES
        self._reference, self._frozen, self._numbers = reference, inputs.frozen, numbers
        self._stage, self._dtype = config.stage, config.model.dtype
        self._batch, self._rate = config.train.batch, first_step(config.train)
        held = inputs.pairs.sources["heldout"]
        self._resolution = next(iter(configuration.resolutions(config).values()))
        mine = local_rows(self._batch, inputs.mesh)
        batches = [FirstBatches(source, self._batch, HELDOUT_PAIRS // len(held), mine) for source in held]
        self._held = [(each, i) for each in batches for i in range(len(each))]
        everywhere = replicated(inputs.mesh)
        self._loss_metrics = jax.jit(lambda *arguments: inputs.loss(*arguments)[1], out_shardings=everywhere)
        rows = first_records(held, SHOWN)
        settings = ConfigDict({**config.evaluate, "batch": min(config.evaluate.batch, len(rows))})
        self._sampler = Sampler.from_config(inputs.pipeline, inputs.mesh, settings, config.seed)
        self._ids = np.stack([row["input_ids"] for row in rows])
        self._concept = np.stack([r["concept"] for r in rows]).astype(np.float32) if "concept" in rows[0] else None
        self._keys = self._sampler.keys("samples", [row["id"].decode() for row in rows], [0] * len(rows))
        self._faces = FaceDetector()
        self._prompts = Prompts(inputs.prompts, self._sampler, self._resolution) if inputs.prompts else None
        self._worst = UNLEARNING

    def report(self, values: dict[str, float], step: int) -> None:
        """Writes a log line, and warns of a policy that unlearns the winners.

        Args:
            values: means over the steps since the last line.
            step: that they end with.
        """
        self.log.write(values, step)
        if "error/winner_reference" not in values:
            return
        ratio = values["error/winner"] / max(values["error/winner_reference"], 1e-12)
        if ratio > self._worst:
            self._worst = 1.25 * ratio  # the next warning is of something new
            logging.warning("step %d: the winner's error is %.2f times the reference's: the policy unlearns the "
                            "winners and pictures will turn to noise; train again in another workdir with %s",
                            step, ratio, CALMER)  # fmt: skip

    def evaluate(self, state: TrainState, step: int) -> None:
        """Measures held-out pairs at fixed noise and timesteps, and draws held-out captions from fixed seeds with what
        the stage would hand on; says in a line what it found."""
        self._sampler.use_policies(state.result)
        latents = self._sampler.generate(self._ids, self._keys, self._resolution, "samples", self._concept)
        pictures = self._sampler.decode(latents, "decode")
        self.log.samples(SAMPLES, grid(pictures, 4), step)
        if self._prompts is not None:
            self.log.samples(PROMPTS, self._prompts.sheet(step), step)
        if step == 0 and self._reference:
            self._print_noise(state.policy)
        found = [self._measured(state.policy, self._reference, i) for i in range(len(self._held))]
        values = {f"heldout/{name}": value for name, value in average(jax.device_get(found)).items()}
        values[FACES] = float(np.mean(self._faces.detect(pictures.astype(np.float32)).found))
        self.log.write(values, step)
        figures = ", ".join(form.format(values[name]) for name, form in _SAID.items() if name in values)
        say(f"{self._stage}: look at step {step}: {figures} of {self._samples / str(step)}.png")

    def _measured(self, policy: Params, reference: Params, i: int) -> Metrics:
        """The loss's metrics on a batch of held-out pairs, at the noise that this batch always has."""
        noise = jax.random.split(stream_key(0, "heldout", i), self._batch)
        batches, number = self._held[i]
        batch = to_devices(batches[number], self._sampler.mesh) | {
            "key": place(noise, batch_sharding(self._sampler.mesh))
        }
        return self._loss_metrics(policy, reference, self._frozen, batch, self._numbers)

    def _print_noise(self, policy: Params) -> None:
        """Prints how far rounding and an optimizer step in a random direction move the margins, times κ."""

        def moved(x: Array, key: Array, rate: Float[Array, ""]) -> Array:
            return x + rate * jax.random.rademacher(key, x.shape, x.dtype)

        def one(path: tuple, x: jax.Array) -> jax.Array:  # a small program for each shape, not one of all parameters
            key = place(stream_key(0, "noise", path_name(path)), replicated(self._sampler.mesh))
            return jax.jit(moved, out_shardings=x.sharding)(x, key, np.float32(self._rate))

        perturbed = jax.tree.map_with_path(one, policy)
        found = [self._measured(perturbed, policy, i) for i in range(min(_NOISY, len(self._held)))]
        mean, deviation = (np.array([m[f"dpo/margin{x}"] for m in found], np.float64) for x in ("", "_deviation"))
        noise = float(np.sqrt(np.mean(deviation**2) + mean.var()))  # over all of them
        print(f"{self._stage}: rounding in {self._dtype} and a step of {self._rate:g} in a random direction move "
              f"margins by {noise:.2g}: accuracies say little of smaller margins")  # fmt: skip


def announce(config: ConfigDict, inputs: Inputs, state: TrainState) -> None:
    """Prints where a stage is trained, which parameters, and on which batches."""
    kept = ("text",) if isinstance(inputs.pipeline.text, KeptText) else ()  # which has no parameters
    networks = {name: tree for name, tree in inputs.frozen.items() if name not in kept}
    parameters = {"trained": state.policy, "frozen": networks}
    trained, frozen = (sum(x.size for x in jax.tree.leaves(tree)) for tree in parameters.values())
    unit = "pairs" if config.train.objective != "sft" else "photographs"
    print(f"{config.stage}: {describe_mesh(inputs.mesh)}, {config.train.batch} {unit} a step")
    if config.model.lora:
        print(f"{config.stage}: {config.model.lora} is merged into the base of policy and reference")
    print(f"{config.stage}: trains {config.train.params}, {trained:,} of {trained + frozen:,} parameters of UNet and "
          f"text, in float32; the others are {config.model.dtype}")  # fmt: skip
    for line in _table(parameters):
        print(f"{config.stage}:   {line}")
    for source in inputs.pairs.sources["train"]:
        (row,) = FirstBatches(source, 1, 1)
        fields = [f"{name} {x.dtype} {[config.train.batch, *x.shape[1:]]}" for name, x in row.items()]
        count = len(source) // max(1, config.train.reference_cache)
        print(f"{config.stage}: {count:,} {unit}, in batches of {', '.join(fields)}")
    if mesh_peak(inputs.mesh, config.model.dtype) is None:
        print(f"{config.stage}: the peak of {inputs.mesh.devices.flat[0].device_kind} in {config.model.dtype} is "
              "unknown: the log has no speed/share_of_peak")  # fmt: skip


def _table(trees: dict[str, Params]) -> list[str]:
    """Lines that say how many parameters each module has, of which dtype, and whether they are trained or frozen."""
    counts: dict[tuple[str, str, str], int] = {}
    for use, tree in trees.items():
        for path, x in jax.tree.leaves_with_path(tree):
            row = (".".join(path_name(path).split(".")[:2]), x.dtype.name, use)
            counts[row] = counts.get(row, 0) + x.size
    return [f"{name:28} {count:>13,}  {dtype:8}  {use}" for (name, dtype, use), count in sorted(counts.items())]


def warn_of_hours(config: ConfigDict, inputs: Inputs, left: int, step: jax.stages.Wrapped, *arguments: Any) -> None:
    """Warns how long a processor will take for a model that is made for accelerators.

    Args:
        config, inputs: of the stage.
        left: steps to go.
        step: the jitted step.
        *arguments: of the step.
    """
    size = sum(x.size for x in jax.tree.leaves((inputs.policy, inputs.frozen)))
    if jax.default_backend() == "cpu" and size > _LARGE:
        cores = os.cpu_count() or 1
        hours = left * operations(step.trace(*arguments).jaxpr) / (cores * CORE * jax.process_count()) / 3600
        logging.warning("%s is trained on a processor: %d steps will take about %.0f hours on its %d cores; a GPU or a "
                        "TPU needs jax for it, see README", config.model.base, left, hours, cores)  # fmt: skip
