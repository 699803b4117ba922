"""Grain: which records make the batch of a step. A function of (seed, step) alone, whatever the number of processes.

A batch comes from one source, so that its latents have one shape; sources take turns in proportion to their sizes. Each
repeats without end, so what is left over from one pass begins the next and nothing is dropped.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np

Batch = dict[str, np.ndarray]
_FIELDS = ("winner", "loser", "input_ids", "concept")


def arrays(record: dict[str, Any]) -> Batch:
    """What a step needs of a record: latents and concept features float32, token ids int32."""
    return {
        name: np.asarray(record[name], np.int32 if name == "input_ids" else np.float32)
        for name in _FIELDS
        if name in record
    }


_PASSES = 2**32  # without end; a length that Grain cannot count with is not taken


class PairLoader:
    """An endless stream of batches: this process's rows of each.

    All randomness comes before the slice into processes, so that the position is one number, the same for every
    process count.

    Args:
        sources: random access to decoded records, one source for each resolution.
        batch: rows over all processes.
        seed: of the shuffle; each pass over the records has its own order.
        position: examples already drawn, from :attr:`position` of an earlier stream.
    """

    def __init__(self, sources: Sequence[Any], batch: int, seed: int, position: int = 0) -> None:
        here = batch // jax.process_count()
        batches = [
            grain.MapDataset.source(source)
            .seed(seed)
            .shuffle()
            .repeat(_PASSES)
            .map(arrays)[jax.process_index() :: jax.process_count()]
            .batch(here)
            for source in sources
        ]
        # Mixed by position, after batching: every process takes the same source at the same step.
        dataset = grain.MapDataset.mix(batches, weights=[len(source) for source in sources])
        self._batch = batch
        self._iterator = dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)).__iter__()
        self._iterator.set_state({"next_index": position // batch})

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    @property
    def position(self) -> int:
        """Examples drawn so far, over all processes."""
        return self._iterator.get_state()["next_index"] * self._batch


def first_batches(source: Any, batch: int, limit: int) -> list[Batch]:
    """The first records in order, at most `limit`, in full batches; the last wraps around to the first."""
    count = max(1, min(len(source), limit) // batch) if len(source) >= batch else 1
    rows = [arrays(source[i % len(source)]) for i in range(count * batch)]
    here = batch // jax.process_count()
    start = jax.process_index() * here
    return [
        {name: np.stack([row[name] for row in rows[b : b + batch]])[start : start + here] for name in rows[0]}
        for b in range(0, count * batch, batch)
    ]
