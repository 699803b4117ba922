"""Pairs that people have rated: some are left out, and of some winner and loser change places.

The page of :mod:`hgdpo_jax.browse` exports what was rated there as one file, of all stages:

    {"hgdpo_jax": "ratings", "stages": {"stage1": {ID: {"pair": HASH, "better": "loser"}, …}, …}}

`pairs` checks those of its stage and keeps them in W/stageN/pairs/ratings.json. The shards stay as they are: whatever
opens the pairs from then on sees them as they were rated.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hgdpo_jax.data.record import Record, RecordSource
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import as_written, json_hash

NAME = "ratings.json"
EXPORT = "ratings"  # what the page's file says it is
# Which of a pair is better → what becomes of the pair, where something does.
BETTER = {"winner": "", "loser": "", "equal": "its pictures were rated equal", "neither": "it was dropped by hand"}


@dataclass(frozen=True)
class Ratings:
    """id → which of the pair is better, one of :data:`BETTER`, of those that were rated."""

    better: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def dropped(self) -> dict[str, str]:
        """id → why it is left out. Pictures that are rated equal teach no preference."""
        return {name: BETTER[better] for name, better in self.better.items() if BETTER[better]}

    @cached_property
    def swapped(self) -> set[str]:
        """The ids whose winner and loser change places."""
        return {name for name, better in self.better.items() if better == "loser"}

    @property
    def hash(self) -> str:
        """sha256 of what they change; empty where that is nothing."""
        changed = [sorted(self.dropped), sorted(self.swapped)]
        return json_hash(changed) if any(changed) else ""

    def __str__(self) -> str:
        counts = Counter(self.better.values())
        return (f"{counts['neither']} dropped, {counts['equal']} dropped as equal, {counts['loser']} swapped, "
                f"{counts['winner']} confirmed")  # fmt: skip


def pair_hash(record: Record) -> str:
    """Tells a pair by its two latents, whatever its id: 16 hexadecimal digits."""
    return hashlib.sha256(record["winner"].tobytes() + record["loser"].tobytes()).hexdigest()[:16]


def read_exported(path: Path, stage: str) -> dict[str, dict[str, str]] | None:
    """id → {"pair", "better"} of a stage, from a file that the page exported; None where it does not know that stage.

    Raises:
        UserError: there is no such file, or it is another.
    """
    if not path.is_file():
        raise UserError("no such file; export one on the page of python -m hgdpo_jax.browse")
    with as_written(path, "export one on the page of python -m hgdpo_jax.browse"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["hgdpo_jax"] != EXPORT:
            raise ValueError(f"it holds {content['hgdpo_jax']!r}, not {EXPORT!r}")
        if stage not in content["stages"]:
            return None
        found = {str(name): dict(rated) for name, rated in content["stages"][stage].items()}
        for name, rated in found.items():
            if rated["better"] not in BETTER or not isinstance(rated["pair"], str):
                raise ValueError(f"{name} is rated {rated['better']!r}")
    return found


def read_kept(folder: Path, manifest: str) -> Ratings:
    """The ratings that are kept beside finished shards; none where there are none.

    Args:
        folder: W/stageN/pairs.
        manifest: sha256 of the manifest.

    Raises:
        UserError: they are damaged, or of other shards.
    """
    path = folder / NAME
    if not path.is_file():
        return Ratings()
    with as_written(path, "remove it, and give the ratings to pairs again"):
        content = json.loads(path.read_text())
        if content["manifest"] != manifest:
            raise ValueError("it rates other shards than are there now")
        found = Ratings({str(name): str(better) for name, better in content["better"].items()})
        _ = found.dropped  # raises where one is rated otherwise
    return found


def kept(ratings: Ratings, manifest: str) -> dict[str, Any]:
    """What :func:`read_kept` reads."""
    return {"manifest": manifest, "better": dict(ratings.better)}


class RatedRecords:
    """The records of a split without those that are dropped, and with winner and loser of those that are swapped in
    each other's place; the winner's number, which nobody knows of a loser, is -1 there.

    Args:
        source: of all records.
        ids: theirs.
        ratings: of the stage.
    """

    def __init__(self, source: RecordSource, ids: Sequence[str], ratings: Ratings) -> None:
        dropped, swapped = ratings.dropped, ratings.swapped
        self._source = source
        self._rows = [(row, name in swapped) for row, name in enumerate(ids) if name not in dropped]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Record:
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        row, swapped = self._rows[i]
        record = self._source[row]
        return record | _swapped(record) if swapped else record


def _swapped(record: Record) -> Record:
    return {
        "winner": record["loser"],
        "loser": record["winner"],
        "winner_score": record["loser_score"],
        "loser_score": record["winner_score"],
        "winner_number": -1,
    }
