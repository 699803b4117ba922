"""Grain: which records make the batch of a step. A function of (seed, step) alone, whatever the processes and devices.

A batch comes from one source, so that its latents have one shape; sources take turns in proportion to their sizes. Each
repeats without end, so what is left over from one pass begins the next and nothing is dropped.
"""

from collections.abc import Iterator, Sequence

import grain
import numpy as np
from jaxtyping import Int

from hgdpo_jax.data.record import ENCODED, Record, RecordSource

Batch = dict[str, np.ndarray]
Rows = Sequence[int] | Int[np.ndarray, "r"]
_FIELDS = ("winner", "loser", "input_ids", "concept", "example", "reference", "scores", *ENCODED)
_PASSES = 2**32  # without end; a length that Grain cannot count with is not taken


def stack_records(source: RecordSource, numbers: Sequence[int | np.integer]) -> Batch:
    """What a step needs of some records, as they are stored: latents and concept features float16, token ids int32, and
    perhaps what :class:`hgdpo_jax.training.reference_cache.Draws`, :class:`hgdpo_jax.data.record.WithScores` or
    :class:`hgdpo_jax.data.record.WithText` adds.

    Each is copied before the next is read: memory that the processor has at hand is used again.
    """
    batch: Batch = {}
    for row, number in enumerate(numbers):
        record = source[int(number)]
        for name in _FIELDS:
            if name in record:
                value = np.asarray(record[name])
                if name not in batch:
                    batch[name] = np.empty((len(numbers), *value.shape), value.dtype)
                batch[name][row] = value
    return batch


class _Batches:
    """Some rows of every batch of a source whose records are taken in an order."""

    def __init__(self, source: RecordSource, order: grain.MapDataset, batch: int, rows: Rows) -> None:
        self._source, self._order, self._batch, self._rows = source, order, batch, rows

    def __len__(self) -> int:
        return len(self._order) // self._batch

    def __getitem__(self, i: int) -> Batch:
        return stack_records(self._source, [self._order[i * self._batch + int(row)] for row in self._rows])


class PairLoader:
    """An endless stream of batches: some rows of each.

    All randomness comes before the choice of rows, so that a row's example depends on its place in the batch alone, and
    the position is one number, the same for every process count.

    Args:
        sources: random access to decoded records, one source for each resolution.
        batch: rows over all processes.
        seed: of the shuffle; each pass over the records has its own order.
        position: examples already drawn, from :attr:`position` of an earlier stream.
        rows: those that this process loads, see :func:`hgdpo_jax.devices.transfer.local_rows`; all unless given.
    """

    def __init__(
        self, sources: Sequence[RecordSource], batch: int, seed: int, position: int = 0, rows: Rows | None = None
    ) -> None:
        rows = range(batch) if rows is None else rows
        orders = [grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat(_PASSES) for source in sources]
        batches = [
            grain.MapDataset.source(_Batches(source, order, batch, rows))
            for source, order in zip(sources, orders, strict=True)
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


class FirstBatches(Sequence[Batch]):
    """Some rows of each full batch of a source's first records in order, read when asked for; the last wraps around to
    the first.

    Args:
        source: of records.
        batch: rows over all processes.
        limit: of records.
        rows: those that this process loads; all unless given.
    """

    def __init__(self, source: RecordSource, batch: int, limit: int, rows: Rows | None = None) -> None:
        self._source, self._batch = source, batch
        self._count = max(1, min(len(source), limit) // batch) if len(source) >= batch else 1
        self._rows = range(batch) if rows is None else rows

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> Batch:  # type: ignore[override]  # no slices
        begin = range(self._count)[i] * self._batch
        return stack_records(self._source, [(begin + int(row)) % len(self._source) for row in self._rows])


def first_records(sources: Sequence[RecordSource], count: int) -> list[Record]:
    """The first records, of one source after the other."""
    return [source[i] for source in sources for i in range(min(count, len(source)))][:count]
