"""What a run keeps, and the settings that people give."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hgdpo_jax import config as configuration
from hgdpo_jax.data import built, ratings, shards
from hgdpo_jax.data.pairs import open_pairs
from hgdpo_jax.data.record import features
from hgdpo_jax.data.shards import ShardPhotograph
from hgdpo_jax.results import evaluation, exported, images
from hgdpo_jax.run import command, provenance
from hgdpo_jax.run.files import file_hash, write_json
from hgdpo_jax.run.folder import last_stage, stage_config
from hgdpo_jax.run.index import Index
from hgdpo_jax.run.settings import load_config, setting_keys
from hgdpo_jax.training import metrics
from hgdpo_jax.training.checkpoints import Checkpoints
from tests import tiny
from tests.mutations.case import Case, written

_GIVEN = {"train.lr": "1e-4", "train.steps": "30", "data.mirror": "true", "pairs.strengths": "4,5", "mesh.tensor": "1",
          "evaluate.concept_prompts": '["a, b", "c"]', "model.base": "x", "data.resolutions": "64x64"}  # fmt: skip
_CONFIG = b"""from ml_collections import ConfigDict

from hgdpo_jax.config import default


def get_config(variant: str = "a") -> ConfigDict:
    config = default()
    config.stage = "mine"
    config.train.steps = 30
    config.train.update(lr=1e-4, beta=3000.0)
    config.data.resolutions = ("64x64",)
    return config
"""
_SHARD = "pairs-train_32x32.array_record-00000-of-00002"
_PHOTOGRAPHS = [ShardPhotograph("train0-0", "0" * 64), ShardPhotograph("a", None)]
_MADE_FROM = {"seed": 0, "data.resolutions": ["64x64"], "content of model.base": "0" * 64}


def _read_settings(folder: Path) -> bool:
    last_stage(folder)
    for stage in ("stage1", "stage2"):
        config = stage_config(folder, stage)
        keys = setting_keys(config)
        provenance.settings(config, keys)
        configuration.resolutions(config)
        assert {setting.key for setting in configuration.SETTINGS} <= set(keys)
    return True


def _read_overrides(folder: Path) -> bool:
    """Of the command line."""
    given = (folder / "overrides.json").read_text(errors="surrogateescape")
    try:
        entries = json.loads(given)
        words = [f"--config.{key}={value}" for key, value in entries.items()]
    except (ValueError, AttributeError):
        words = given.split("\n")
    config = load_config("configs/stage2.py:portraits", command.overrides(words))
    configuration.resolutions(config)
    command.as_arguments(config)
    return True


def _read_config(folder: Path) -> bool:
    configuration.to_json(load_config(f"{folder / 'mine.py'}:a"))
    return True


def _read_pairs(folder: Path) -> bool:
    pairs = open_pairs(folder / "pairs", "BUILD")
    pairs.require({"32x32": tiny.LATENT})
    pairs.require_from({})
    for role in ("train", "heldout"):
        assert len(pairs.by_id(role)) == sum(map(len, pairs.sources[role]))
        for source in pairs.sources[role]:
            assert all(source[row]["winner"].shape == tiny.LATENT for row in range(len(source)))
    return True


def _read_exported(folder: Path) -> bool:
    """As `pairs` reads the ratings that it is given."""
    return ratings.read_exported(folder / "ratings.json", "stage1") is not None


def _look_at_pairs(folder: Path) -> bool:
    """As the page of pairs does."""
    listed = built.list_shards(folder / "pairs")
    return sum(len(built.read_shard(shard).records) for shard in listed) == 6


def _write_rated(folder: Path) -> None:
    path = tiny.write_pairs(folder / "pairs", 4, 2)
    rated = ratings.Ratings({"train0-0": "loser", "train1-0": "equal"})
    write_json(path / ratings.NAME, ratings.kept(rated, file_hash(path / "manifest.json")))


def _go_on_with_pairs(folder: Path) -> bool:
    """As a build does that was stopped."""
    shards.is_finished(folder / "pairs", _MADE_FROM)
    path = folder / "pairs" / _SHARD
    return shards.is_whole(path) and shards.is_made_of(path, _PHOTOGRAPHS)


def _read_checkpoint(folder: Path) -> bool:
    with Checkpoints(folder / "stage1") as checkpoints:
        step = checkpoints.latest()
        if step is not None:
            checkpoints.meta(step)
    return step is not None


def _read_index(folder: Path) -> bool:
    index = Index(folder / "content.json")
    index.hash(folder / "a.txt")
    index.shape(folder / "a.txt", lambda path: (1, 2))
    return True


def _read_log(folder: Path) -> bool:
    found = metrics.read(folder)
    metrics.was_evaluated(folder, 2)
    return len(found) == 3


def _read_drawn(folder: Path) -> bool:
    """What an evaluation has drawn before; it draws again what it cannot read."""
    return evaluation.drawn_before(folder / "easy.npz", "mark") is not None


def _compare(folder: Path, about: Mapping[str, Any]) -> bool:
    return exported._holds(folder, about)


def _claim(folder: Path, settings: dict[str, Any]) -> bool:
    images.require_own(folder, settings)
    return True


def _write_run(folder: Path) -> None:
    base = Path("base")
    write_json(folder / "stage1" / "config.json", configuration.to_json(tiny.config(base)))
    write_json(folder / "stage2" / "config.json", configuration.to_json(tiny.config(base, "stage2", start="stage1")))


def _write_unfinished(folder: Path) -> None:
    schema, record = features(tiny.LATENT[-1], 77, loser=True), tiny.record("train0-0", np.random.default_rng(0))
    shards.begin(folder / "pairs", _MADE_FROM)
    shards.write_shard(folder / "pairs" / _SHARD, schema, [record], _PHOTOGRAPHS)


def _write_checkpoint(folder: Path) -> None:
    import jax.numpy as jnp

    with Checkpoints(folder / "stage1") as checkpoints:
        checkpoints.save(2, {"a": jnp.arange(6.0)}, {"made_from": _MADE_FROM, "position": 4})


def cases() -> dict[str, Case]:
    """All of them by name."""
    run, checkpoint = written(_write_run), written(_write_checkpoint)
    pairs, rated = written(lambda folder: tiny.write_pairs(folder / "pairs", 4, 2)), written(_write_rated)
    better = {"a": {"pair": "0" * 16, "better": "loser"}, "b": {"pair": "1" * 16, "better": "equal"}}
    export = json.dumps({"hgdpo_jax": "ratings", "stages": {"stage1": better, "stage2": {}}}).encode()
    unfinished, shard = written(_write_unfinished), f"pairs/{_SHARD}"
    note = f"{shard}.json"
    about, settings = {"version": "1", "policies": {"easy": "0"}}, {"model": "x", "size": [64, 64], "seed": 0}
    lines = b"".join(
        json.dumps({"step": step, "loss/total": 0.5, "heldout/x": 1.0}).encode() + b"\n" for step in (1, 2, 3)
    )
    kept = {"score": np.ones((3, 2)), "pictures": np.zeros((3, 8, 8, 3), np.uint8), "mark": np.array("mark")}
    drawn = written(lambda folder: np.savez(folder / "easy.npz", **kept))
    entry = {"/x/a.txt": [1, 2, "0" * 64, None], "/x/b.png": [1, 2, None, [3, 4]]}
    index = {"content.json": json.dumps(entry).encode(), "a.txt": b"a"}
    return {
        "run": Case(run, list(run), _read_settings),
        "overrides": Case({"overrides.json": json.dumps(_GIVEN).encode()}, ["overrides.json"], _read_overrides,
                          named=""),
        "config": Case({"mine.py": _CONFIG}, ["mine.py"], _read_config),
        "pairs": Case(pairs, ["pairs/manifest.json", "pairs/features.json", "pairs/dataset_info.json", shard, note],
                      _read_pairs),
        "unfinished pairs": Case(unfinished, ["pairs/building.json", note], _go_on_with_pairs),
        "rated pairs": Case(rated, ["pairs/ratings.json"], _read_pairs),
        "ratings": Case({"ratings.json": export}, ["ratings.json"], _read_exported),
        "pairs to look at": Case(pairs, [shard, note], _look_at_pairs),
        "checkpoint": Case(checkpoint, ["stage1/policy/2.sha256.json"], _read_checkpoint),
        "index": Case(index, ["content.json"], _read_index),
        "log": Case({"metrics.jsonl": lines}, ["metrics.jsonl"], _read_log),
        "drawn": Case(drawn, ["easy.npz"], _read_drawn),
        "export": Case({"hgdpo.json": json.dumps(about).encode()}, ["hgdpo.json"], partial(_compare, about=about)),
        "images": Case({"settings.json": json.dumps(settings).encode()}, ["settings.json"],
                       partial(_claim, settings=settings)),
    }  # fmt: skip
