"""The order of the records: resumable from one number, the same for every number of processes."""

import numpy as np
import pytest

from hgdpo_jax.data.loader import FirstBatches, PairLoader


class Source:
    """Ten records whose latents carry their number."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, i: int) -> dict:
        latent = np.full((1, 1, 1), i, np.float16)
        return {"winner": latent, "loser": -latent, "input_ids": np.array([i], np.int32), "id": b"x"}


def numbers(loader: PairLoader, count: int) -> list[list[int]]:
    return [next(loader)["input_ids"].ravel().tolist() for _ in range(count)]


def test_every_record_comes_once_in_each_pass_in_another_order() -> None:
    drawn = np.array(numbers(PairLoader([Source()], 5, seed=0), 4)).reshape(2, 10)
    assert (np.sort(drawn, axis=1) == np.arange(10)).all()
    assert not np.array_equal(drawn[0], drawn[1])
    assert numbers(PairLoader([Source()], 5, seed=1), 4) != drawn.reshape(4, 5).tolist()


def test_batches_of_one_have_no_end_either() -> None:
    assert sorted(numbers(PairLoader([Source()], 1, seed=0), 10)) == [[i] for i in range(10)]


def test_it_goes_on_where_it_stood() -> None:
    whole = numbers(PairLoader([Source()], 4, seed=3), 9)
    loader = PairLoader([Source()], 4, seed=3)
    first = numbers(loader, 5)
    assert loader.position == 20
    assert first + numbers(PairLoader([Source()], 4, seed=3, position=loader.position), 4) == whole


@pytest.mark.parametrize("parts", [([0, 1], [2, 3]), ([0, 2], [1, 3]), ([0, 1], [0, 1], [2, 3], [2, 3])])
def test_a_row_of_a_batch_is_the_same_whoever_loads_it(parts: tuple[list[int], ...]) -> None:
    whole = np.array(numbers(PairLoader([Source()], 4, seed=3), 5))
    for rows in parts:
        assert numbers(PairLoader([Source()], 4, seed=3, rows=rows), 5) == whole[:, rows].tolist()


def test_latents_stay_as_they_are_stored_and_other_fields_behind() -> None:
    batch = next(PairLoader([Source()], 2, seed=0))
    assert set(batch) == {"winner", "loser", "input_ids"}
    assert batch["winner"].dtype == np.float16 and batch["winner"].shape == (2, 1, 1, 1)
    assert batch["input_ids"].dtype == np.int32


@pytest.mark.parametrize(("batch", "limit", "expected"), [(4, 256, 8), (4, 4, 4), (16, 256, 16)])
def test_held_out_batches_are_the_first_records_and_full(batch: int, limit: int, expected: int) -> None:
    found = FirstBatches(Source(), batch, limit)
    assert np.concatenate([b["input_ids"].ravel() for b in found]).tolist() == [i % 10 for i in range(expected)]


class Wide(Source):
    """Thirty records of another shape, numbered from 100."""

    def __len__(self) -> int:
        return 30

    def __getitem__(self, i: int) -> dict:
        record = super().__getitem__(i)
        return record | {"winner": np.zeros((1, 2, 1), np.float16), "input_ids": np.array([100 + i], np.int32)}


def test_a_batch_has_one_shape_and_nothing_is_left_out() -> None:
    loader = PairLoader([Source(), Wide()], 4, seed=0)
    batches = [next(loader) for _ in range(40)]
    for batch in batches:
        wide = batch["winner"].shape == (4, 1, 2, 1)
        assert ((batch["input_ids"] >= 100) == wide).all()
    seen = np.concatenate([batch["input_ids"].ravel() for batch in batches])
    assert set(seen) == {*range(10), *range(100, 130)}
    assert (np.unique(seen, return_counts=True)[1] == 4).all()  # 160 draws of 40 records: four passes


def test_processes_take_the_same_shape_at_a_step_and_resume_at_it() -> None:
    parts = [numbers(PairLoader([Source(), Wide()], 4, seed=3, rows=rows), 20) for rows in ([0, 1], [2, 3])]
    assert all((a[0] >= 100) == (b[0] >= 100) for a, b in zip(*parts, strict=True))
    assert numbers(PairLoader([Source(), Wide()], 4, seed=3, position=4 * 7, rows=[2, 3]), 13) == parts[1][7:]


def test_held_out_rows_are_those_of_the_whole_batch() -> None:
    whole, part = FirstBatches(Source(), 4, 8), FirstBatches(Source(), 4, 8, rows=[1, 3])
    assert [b["input_ids"].ravel().tolist() for b in part] == [b["input_ids"][[1, 3]].ravel().tolist() for b in whole]
