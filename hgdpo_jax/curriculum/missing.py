"""Photographs that will have no pair, or have none, and why."""

import errno
import logging
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ml_collections import ConfigDict

from hgdpo_jax.curriculum.plan import Photographs, ShardPlan
from hgdpo_jax.data import shards
from hgdpo_jax.pictures.read import UnreadableImage, image_shape
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import Member
from hgdpo_jax.run.index import Index
from hgdpo_jax.run.progress import Progress

_THREADS = 8  # that open photographs
GONE = "its file is missing"
FILTERED = "its winner scores lower than its loser"


def require_photographs(photographs: Photographs, index: Index) -> None:
    """Warns of photographs that cannot be opened, before anything is made of the others: the easy stage looks at their
    captions only, and would draw for them in vain.

    Args:
        photographs: by their role.
        index: knows those that were opened before.

    Raises:
        UserError: none can be opened.
    """
    listed = [p for found in photographs.values() for p in found]
    pictures = list(dict.fromkeys(file for p in listed for file in (p.picture, p.loser) if file is not None))
    with ThreadPoolExecutor(_THREADS) as threads:
        opened = threads.map(lambda picture: _fault(picture, index), pictures)
        bar = Progress(opened, "photographs", len(pictures), unit="photograph", leave=False, delay=2)
        found = zip(pictures, bar, strict=True)
        faults = {picture: fault for picture, fault in found if fault}
    if not faults:
        return
    first, reason = next(iter(faults.items()))
    missing = sum(reason == os.strerror(errno.ENOENT) for reason in faults.values())
    line = (f"{len(faults)} of {len(pictures)} photographs cannot be opened, {missing} of them are missing; the first "
            f"is {first} ({reason})")  # fmt: skip
    if len(faults) == len(pictures):
        raise UserError(f"{line}; is their folder mounted?")
    logging.warning("%s; they have no pair in stages that use photographs", line)


def _fault(picture: Path | Member, index: Index) -> str | None:
    """Why a photograph cannot be opened; None where it can."""
    try:
        index.shape(picture, image_shape)
    except OSError as error:
        return error.strerror or str(error)
    except (ValueError, UnreadableImage) as error:
        return str(error)
    return None


def why_no_pair(config: ConfigDict, photographs: Photographs, plan: Sequence[ShardPlan]) -> dict[str, str]:
    """Id → reason, of the photographs that have no pair in a finished stage.

    Args:
        config: of the stage.
        photographs: by their role.
        plan: all shards.
    """
    reasons: dict[str, str] = {}
    planned = {photograph.id for part in plan for photograph in part.photographs}
    for part in plan:
        note = shards.read_note(part.path)
        reasons |= why_no_record(config, note.examples, note.records)
    for listed in photographs.values():
        reasons |= {p.id: f"it has none in {config.pairs.loser}" for p in listed if p.id not in planned}
    return reasons


def why_no_record(
    config: ConfigDict, examples: Iterable[shards.ShardPhotograph], records: Iterable[str]
) -> dict[str, str]:
    """Id → reason, of the examples of a shard, or of a part of it, that have no record there.

    Args:
        config: of the stage.
        examples: that the shard is made of.
        records: the ids of its records.
    """
    pairs, kept = config.pairs, set(records)
    dropped = "no face is found in it"  # of those that are read, an adapter's concept images
    if pairs.keep_if_winner_scores_higher:
        dropped = FILTERED if pairs.redraw == "all" else f"{dropped}, or {FILTERED}"
    unread = "it is no picture that can be read" if pairs.loser != "given" else "one of its pictures cannot be read"
    without = (example for example in examples if example.id not in kept)
    return {e.id: dropped if e.readable else unread if e.content else GONE for e in without}
