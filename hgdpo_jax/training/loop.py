"""Training of one stage, from its shards and its predecessor to its last checkpoint."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from hgdpo_jax import config as configuration
from hgdpo_jax import runtime
from hgdpo_jax.data.loader import PairLoader, first_batches
from hgdpo_jax.data.pairs import Pairs, open_stage, write_json
from hgdpo_jax.diffusion import pipeline as pipelines
from hgdpo_jax.diffusion.painter import Painter
from hgdpo_jax.errors import UserError
from hgdpo_jax.scoring.pictures import grid
from hgdpo_jax.training import policy as policies
from hgdpo_jax.training import step as steps
from hgdpo_jax.training.checkpoints import Checkpoints, tree_hash
from hgdpo_jax.training.metrics import MetricLog, average
from hgdpo_jax.training.optimizer import make_optimizer

HELDOUT_PAIRS = 256
SAMPLES = 8
# What may differ between a run and its resumption without changing what is trained.
_FREE = ("train.steps", "train.checkpoint_every", "train.log_every", "train.eval_every", "train.checkpointing", "mesh",
         "evaluate")  # fmt: skip


def check_same(old: dict[str, Any], new: dict[str, Any], workdir: Path) -> None:
    """Raises UserError that names the first setting in which a checkpoint's config differs from this run's."""
    old_config, new_config = ConfigDict(old), ConfigDict(new)
    for key in configuration.keys(new_config):
        if any(key == free or key.startswith(f"{free}.") for free in _FREE):
            continue
        was, now = configuration.get(old_config, key), configuration.get(new_config, key)
        if was != now:
            raise UserError(
                f"config key {key}={now!r}: the checkpoint in {workdir} was trained with {was!r}; use that value or "
                "another --workdir"
            )


def train(config: ConfigDict, workdir: Path) -> None:
    """Trains `config.stage` in `workdir`, or goes on from its newest whole checkpoint.

    Raises:
        UserError: an input is missing or is not what it claims to be; a loss is NaN or infinite.
    """
    settings, folder = config.train, workdir / config.stage
    mesh = runtime.make_mesh(config.mesh)
    runtime.check_batch(settings.batch // settings.accumulate, mesh, "train.batch / train.accumulate")
    pipeline = policies.load(config, mesh)
    denoiser, base_policy, frozen = steps.split(pipeline, settings.params)
    painter = Painter(
        pipeline,
        mesh,
        sampler=config.evaluate.sampler,
        steps=config.evaluate.steps,
        guidance=config.evaluate.guidance,
        batch=config.evaluate.batch,
        seed=config.seed,
    )
    resolutions = configuration.resolutions(config)
    shapes = {name: pipeline.latent_shape(resolution) for name, resolution in resolutions.items()}
    pairs = open_stage(workdir, settings.pairs or config.stage)
    pairs.require(shapes)

    if config.objective == "dpo":
        loss = steps.dpo_loss(denoiser, pipeline.schedule, settings.beta, settings.lambda_stat)
    else:
        loss = steps.sft_loss(denoiser, pipeline.schedule, config.data.caption_dropout, config.data.concept_dropout)
    tx = make_optimizer(settings)

    start = base_policy if settings.start == "base" else policies.finished(workdir, settings.start, base_policy)
    empty = jax.eval_shape(lambda policy: steps.init_state(policy, tx, settings.ema), start)
    placed = runtime.shardings(empty, mesh)
    state = jax.jit(lambda policy: steps.init_state(policy, tx, settings.ema), out_shardings=placed)(start)
    step = steps.make_step(
        loss, tx, settings.accumulate, settings.ema, runtime.stream_key(config.seed, config.stage, "step"), placed
    )

    # Supervised fine-tuning has no reference.
    reference: Any = {}
    if config.objective == "dpo":
        reference = start if settings.reference == "start" else base_policy
    checkpoints, position = Checkpoints(folder), 0
    identity = {"base": pipelines.weights_hash(config.model.base, config.model.vae), "pairs": pairs.hash}
    newest = checkpoints.latest()
    if newest is None:
        reference_hash = checkpoints.save_reference(reference) if config.objective == "dpo" else ""
    else:
        meta = checkpoints.meta(newest)
        check_same(meta["config"], configuration.to_json(config), workdir)
        for name, value in identity.items():
            if meta[name] != value:
                raise UserError(f"{folder}: the checkpoint was trained with other {name}; use another --workdir")
        reference_hash = meta["reference"]
        if config.objective == "dpo":
            reference = checkpoints.restore_reference(reference, reference_hash)
        state, position = checkpoints.restore(newest, state), meta["position"]
    done = int(state.step)
    if done >= settings.steps:
        print(f"{folder}: already trained to step {done}")
        return
    write_json(folder / "config.json", configuration.to_json(config))

    log = MetricLog(folder / "logs")
    loader = PairLoader(pairs.sources["train"], settings.batch, config.seed, position)
    held = [
        runtime.to_devices(batch, mesh)
        for source in pairs.sources["heldout"]
        for batch in first_batches(source, settings.batch, HELDOUT_PAIRS // len(pairs.sources["heldout"]))
    ]
    evaluate = jax.jit(lambda *arguments: loss(*arguments)[1])
    ids, keys, concept = _samples(pairs, painter)

    def look(now: int) -> None:
        """Held-out pairs at fixed noise and timesteps, and pictures from fixed seeds."""
        found = []
        for i, batch in enumerate(held):
            noise = jax.random.split(runtime.stream_key(0, "heldout", i), settings.batch)
            found.append(evaluate(state.policy, reference, frozen, batch | {"key": noise}))
        log.write({f"heldout/{name}": value for name, value in average(jax.device_get(found)).items()}, now)
        painter.use(state.result)
        latents = painter.generate(ids, keys, next(iter(resolutions.values())), "samples", concept)
        log.images("samples", grid(painter.decode(latents, "decode"), 4), now)

    if done == 0:
        look(0)
    with tqdm(total=settings.steps, initial=done, desc=config.stage, unit="step") as bar:
        for now in range(done + 1, settings.steps + 1):
            state, metrics = step(state, reference, frozen, runtime.to_devices(next(loader), mesh))
            log.add(metrics)
            bar.update()
            last = now == settings.steps
            save = now % settings.checkpoint_every == 0 or last
            if now % settings.log_every == 0 or save:
                values = log.flush(now)  # stops here before a loss that is not finite can reach a checkpoint
                shown = {
                    "loss": f"{values['loss/total']:.4f}",
                    "pairs/s": f"{(bar.format_dict['rate'] or 0) * settings.batch:.1f}",
                }
                if "dpo/accuracy" in values:
                    shown["accuracy"] = f"{values['dpo/accuracy']:.2f}"
                bar.set_postfix(shown)
            if now % settings.eval_every == 0 or last:
                look(now)
            if save:
                meta = {
                    "config": configuration.to_json(config),
                    "config_hash": configuration.content_hash(config),
                    "position": loader.position,
                    "seed": config.seed,
                    "reference": reference_hash,
                    **identity,
                }
                checkpoints.save(now, state, meta)
    if config.objective == "dpo":
        assert tree_hash(reference) == reference_hash, "the reference changed during training"
    print(f"{folder}: trained to step {settings.steps}")


def _samples(pairs: Pairs, painter: Painter) -> tuple[np.ndarray, jax.Array, np.ndarray | None]:
    """Token ids, keys and concepts of the pictures in the log: the first held-out captions, one fixed seed each."""
    rows = [source[i] for source in pairs.sources["heldout"] for i in range(min(SAMPLES, len(source)))][:SAMPLES]
    ids = np.stack([row["input_ids"] for row in rows])
    concept = np.stack([row["concept"] for row in rows]).astype(np.float32) if "concept" in rows[0] else None
    return ids, painter.keys("samples", [row["id"].decode() for row in rows], [0] * len(rows)), concept
