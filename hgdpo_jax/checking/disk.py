"""Bytes that a stage will write, and that are free."""

import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from hgdpo_jax import config as configuration
from hgdpo_jax.curriculum.plan import ShardPlan, group_size
from hgdpo_jax.curriculum.winners import Group, images_per_prompt
from hgdpo_jax.data import shards
from hgdpo_jax.data.record import LATENT, features
from hgdpo_jax.diffusion.pipeline import Pipeline
from hgdpo_jax.run.errors import UserError

_BLOCK = 2**16  # bytes, of ArrayRecord
_BESIDE = 2  # checkpoints beside `train.keep`: the best, and one that is being written


def bytes_of_pairs(config: ConfigDict, plan: Sequence[ShardPlan], pipeline: Pipeline) -> int:
    """What all shards of a plan take, and the parts of one, of which it is put together. Without concept images."""
    loser, sizes, each = config.pairs.loser != "none", configuration.resolutions(config), group_size(config)
    total = largest = 0
    for part in plan:
        shape, ids = pipeline.latent_shape(sizes[part.resolution]), pipeline.tokenize([part.photographs[0].caption])
        latent = np.zeros(shape, LATENT)
        lost: dict[str, Any] = {"loser": latent, "loser_score": np.float32(0)} if loser else {}
        record = Group(part.photographs[:1], ids, sizes[part.resolution]).record(0, latent, **lost)
        (encoded,) = shards.encode(features(shape[2], ids.shape[1], loser), [record]).values()
        count = len(part.photographs)
        total += _of_file(count * len(encoded))
        largest = max(largest, -(-count // each) * _of_file(min(each, count) * len(encoded)))
    return total + largest


def bytes_of_candidates(config: ConfigDict, plan: Sequence[ShardPlan], pipeline: Pipeline) -> int:
    """What `pairs.keep_candidates` keeps of a stage, where nothing is there yet."""
    sizes, each = configuration.resolutions(config), images_per_prompt(config) * np.dtype(LATENT).itemsize
    return sum(len(p.photographs) * each * math.prod(pipeline.latent_shape(sizes[p.resolution])) for p in plan)


def _of_file(records: int) -> int:
    """The size of an ArrayRecord file: whole blocks, and one that says where they are."""
    return (-(-records // _BLOCK) + 1) * _BLOCK


def bytes_of_checkpoints(config: ConfigDict, held: dict[str, int]) -> int:
    """What checkpoints and the reference take, where they are kept on this disk.

    Args:
        config: of the stage.
        held: name → bytes of what is trained; see :class:`hgdpo_jax.planning.program.Program`.
    """
    train = config.train
    if train.checkpoints:
        return 0
    kept = min(train.keep, -(-train.steps // train.checkpoint_every)) + _BESIDE
    kept += train.steps // train.keep_every if train.keep_every else 0
    return kept * (held["policy"] + held["optimizer"]) + held["reference"]


def require_room(workdir: Path, folders: Sequence[Path], needed: int, what: str) -> str:
    """A line that says what is needed and free.

    Args:
        workdir: of the run, which need not exist.
        folders: where it will be written; what is there already is not needed again.
        needed: bytes.
        what: in words.

    Raises:
        UserError: there is no room, or nothing may be written there.
    """
    place = next(path for path in (workdir.absolute(), *workdir.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{place}: cannot be written; choose another --workdir")
    there = sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
    left, free = max(0, needed - there), shutil.disk_usage(place).free
    if left > free:
        raise UserError(f"{place}: {_size(free)} free, {what} will need {_size(left)}; free some disk space, or choose "
                        "another --workdir")  # fmt: skip
    return f"{what} will need {_size(left)}, {_size(free)} free"


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.2g} MB"
