"""Ratings by hand: checked against the pairs of their stage and kept beside them. See :mod:`hgdpo_jax.data.ratings`."""

from collections.abc import Collection
from pathlib import Path

from ml_collections import ConfigDict

from hgdpo_jax.data.built import files_of, list_shards, read_shard, split_of
from hgdpo_jax.data.ratings import NAME, Ratings, kept, pair_hash, read_exported
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import file_hash, write_json
from hgdpo_jax.run.settings import named

Rated = dict[str, dict[str, str]]  # id → {"pair", "better"}
_REMEDY = "give the file that the page of this run exports"


def read_rated(config: ConfigDict, examples: Collection[str]) -> Rated | None:
    """What `pairs.ratings` says of the config's stage; None where it is empty or rates none of that stage.

    Args:
        config: of the stage.
        examples: the ids of those that may have a pair.

    Raises:
        UserError: there is no such file, it is another, or rates pairs of other examples.
    """
    if not config.pairs.ratings:
        return None
    with named("pairs.ratings", config.pairs.ratings):
        rated = read_exported(Path(config.pairs.ratings), config.stage)
        for name in rated or ():
            if name not in examples:
                raise UserError(f"rates a pair of {name}, of which {config.stage} has none; {_REMEDY}")
    if rated is None:
        print(f"config key pairs.ratings={config.pairs.ratings}: rates no pair of {config.stage}")
    return rated


def keep_rated(config: ConfigDict, rated: Rated, folder: Path) -> None:
    """Keeps ratings beside finished pairs, in place of those that are there.

    Args:
        config: of the stage.
        rated: see :func:`read_rated`.
        folder: W/stageN/pairs.

    Raises:
        UserError: they are of other pairs, or leave a split without one.
    """
    ratings = Ratings({name: entry["better"] for name, entry in rated.items()})
    missing, left = set(rated), dict.fromkeys(("train", "heldout"), 0)
    with named("pairs.ratings", config.pairs.ratings):
        for shard in list_shards(folder):
            ids = {name for note in files_of(shard).values() for name in note.records}
            left[split_of(shard).partition("_")[0]] += len(ids - ratings.dropped.keys())
            if ids.isdisjoint(missing):
                continue
            for record in read_shard(shard).records:
                if record["id"] in rated and rated[record["id"]]["pair"] != pair_hash(record):
                    raise UserError(f"rates another pair of {record['id']} than is in {folder}; {_REMEDY}")
            missing -= ids
        if missing:
            raise UserError(f"rates a pair of {min(missing)}, of which {config.stage} has none; {_REMEDY}")
        for role, count in left.items():
            if not count:
                raise UserError(f"leaves no pair of split {role}; keep one")
    write_json(folder / NAME, kept(ratings, file_hash(folder / "manifest.json")))
