"""Pairs as they are so far, whether their building is finished or not: to be looked at and to be rated.

A shard that is not whole yet has groups of some prompts each, which are joined once all are there.
"""

import re
from pathlib import Path
from typing import NamedTuple

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader

from hgdpo_jax.data.pairs import Records
from hgdpo_jax.data.record import Record, features
from hgdpo_jax.data.shards import Note, ShardPhotograph, group_path, is_whole, read_note
from hgdpo_jax.run.errors import UserError

_SHARD = re.compile(r"\.?(pairs-\w+\.array_record-\d{5}-of-\d{5})(\.groups)?")
_FIELDS = ("id", "caption", "winner", "winner_number", "winner_score", "loser", "loser_score")


class Built(NamedTuple):
    """What is there of a shard: its records, in which texts are str, and the examples that these are made of."""

    records: list[Record]
    examples: list[ShardPhotograph]


def list_shards(folder: Path) -> list[Path]:
    """The shards in W/stageN/pairs of which something is there; the files themselves need not be."""
    names = (_SHARD.fullmatch(entry.name) for entry in folder.iterdir())
    return sorted({folder / name[1] for name in names if name})


def split_of(shard: Path) -> str:
    """`train_1024x704` of a shard's file."""
    return shard.name.removeprefix("pairs-").partition(".")[0]


def files_of(shard: Path) -> dict[Path, Note]:
    """The files that hold what is there of a shard, with their notes: itself, or its groups in order."""
    if is_whole(shard):
        return {shard: read_note(shard)}
    groups = group_path(shard, 0).parent
    names = sorted(path for path in groups.glob("[0-9]*") if not path.suffix) if groups.is_dir() else []
    return {path: read_note(path) for path in names if is_whole(path)}


def read_shard(shard: Path) -> Built:
    """What is there of a shard of pairs, while another command may be building it.

    Raises:
        UserError: a file is damaged.
    """
    files: dict[Path, Note] = {}
    while True:
        try:
            before, files = files, files_of(shard)
            encoded = [data for path in files for data in ArrayRecordReader(str(path)).read_all()]
            break
        except (OSError, RuntimeError) as error:  # the latter of ArrayRecord
            if before == files:  # it was not that its groups were joined meanwhile
                raise UserError(f"pair shard {shard}: cannot be read ({' '.join(str(error).split())[:200]}); remove it "
                                "and run pairs again") from error  # fmt: skip
    schema = {name: feature for name, feature in features(1, 1, True).items() if name in _FIELDS}
    found = Records(encoded, tfds.features.FeaturesDict(schema))
    records = [{key: _text(value) for key, value in found[i].items()} for i in range(len(found))]
    return Built(records, [example for note in files.values() for example in note.examples])


def _text(value: object) -> object:
    return value.decode() if isinstance(value, bytes) else value
