"""Builds a stage's pair shards: candidates from ε_base, their scores, winners and losers.

python -m hgdpo_jax.pairs --config configs/stage1.py[:variant] --workdir W

Shards appear one by one in W/stageN/pairs; a run that was stopped goes on with the next one.
"""

import math
from pathlib import Path

import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from tqdm import tqdm

from hgdpo_jax import command, runtime
from hgdpo_jax import config as configuration
from hgdpo_jax.curriculum.selection import make_records
from hgdpo_jax.data import pairs as shards
from hgdpo_jax.data.concepts import encoder_of
from hgdpo_jax.data.photographs import by_shape, list_photographs
from hgdpo_jax.diffusion import pipeline as pipelines
from hgdpo_jax.diffusion.painter import Painter
from hgdpo_jax.errors import UserError
from hgdpo_jax.scoring.preference import Scorer


def build(config: ConfigDict, workdir: Path) -> None:
    """Builds all shards of `config.stage` that are not there yet.

    Raises:
        UserError: an input is missing or broken, or the folder holds shards of another config.
    """
    if config.train.pairs:
        raise UserError(f"{config.stage} learns from the pairs of {config.train.pairs}: build those")
    settings, folder = config.pairs, workdir / config.stage / "pairs"
    earlier_stage = settings.loser.partition("/")[0] if settings.loser.startswith("stage") else None
    earlier = shards.open_stage(workdir, earlier_stage) if earlier_stage else None
    resolutions = configuration.resolutions(config)
    photographs = {
        name: list_photographs(config.data.photographs, split, mirror=config.data.mirror)
        for name, split in (("train", config.data.split), ("heldout", "heldout"))
    }
    if settings.loser != "none" and not settings.scorer:
        raise UserError("config key pairs.scorer: is empty; set it to the folder of a CLIPModel such as PickScore v1")
    made_from = {
        "config": {key: configuration.to_json(config)[key] for key in ("pairs", "data", "seed")},
        "base model": pipelines.weights_hash(config.model.base, config.model.vae),
        "captions.jsonl": shards.file_hash(Path(config.data.photographs) / "captions.jsonl"),
        "scorer": pipelines.weights_hash(settings.scorer) if settings.loser != "none" else "",
        "earlier stage": earlier.hash if earlier else "",
    }
    if config.train.params == "adapter":
        face_id = config.adapter.kind == "face_id"
        made_from["adapter kind"] = config.adapter.kind
        made_from["image encoder"] = (
            config.adapter.identity if face_id else pipelines.weights_hash(config.adapter.image_encoder)
        )
    if shards.begin(folder, made_from):
        print(f"{folder}: already built")
        return
    mesh, dtype = runtime.local_mesh(), config.model.dtype
    pipeline = pipelines.load(
        config.model.base, dtype, vae=config.model.vae, param_dtype=dtype, place=runtime.placer(mesh)
    )
    painter = Painter(
        pipeline,
        mesh,
        sampler=settings.sampler,
        steps=settings.steps,
        guidance=settings.guidance,
        batch=settings.batch,
        seed=config.seed,
    )
    scorer = Scorer(settings.scorer, mesh) if settings.loser != "none" else None
    concepts = encoder_of(config) if config.train.params == "adapter" else None
    tokens = pipeline.tokenize([""]).shape[1]
    latents = {name: pipeline.latent_shape(resolution) for name, resolution in resolutions.items()}
    if earlier:
        earlier.require(latents)
    concept = concepts.nothing.shape[1:] if concepts else None
    schema = shards.features(next(iter(latents.values()))[2], tokens, settings.loser != "none", concept)
    paths: dict[str, list[Path]] = {}
    for role, listed in photographs.items():
        records = earlier.by_id(role) if earlier else {}
        if earlier:  # K: where an earlier stage kept no pair, there is none here
            listed = [photograph for photograph in listed if photograph.id in records]
        for name, bucket in by_shape(listed, resolutions).items():
            split, count = f"{role}_{name}", math.ceil(len(bucket) / settings.shard_size)
            paths[split] = [shards.shard_path(folder, split, i, count) for i in range(count)]
            mine = range(jax.process_index(), count, jax.process_count())
            for i in tqdm(mine, desc=f"{config.stage} pairs, {role} {name}", unit="shard"):
                if paths[split][i].is_file():
                    continue
                part = bucket[i * settings.shard_size : (i + 1) * settings.shard_size]
                made = make_records(
                    config, painter, scorer, part, resolutions[name], pipeline.tokenize, records, concepts
                )
                shards.write_shard(paths[split][i], schema, made)
    multihost_utils.sync_global_devices("pairs")
    if jax.process_index() == 0:
        shards.finish(folder, schema, paths, latents)
    done = shards.open_stage(workdir, config.stage)
    for role, sources in done.sources.items():
        found = sum(map(len, sources))
        print(f"{folder}: {found} of {len(photographs[role])} {role} photographs have a pair")


def main() -> None:
    build(*command.parse("Builds a stage's pair shards."))


if __name__ == "__main__":
    command.run(main)
