"""Which resolution a photograph has, and which ones are chosen for a set of photographs."""

import math
import random

import numpy as np
import pytest

from hgdpo_jax.data.resolutions import MOST, Size, choose, name_of, nearest
from hgdpo_jax.run.errors import UserError

CAMERAS = [(4000, 6000)] * 40 + [(6000, 4000)] * 30 + [(3024, 4032)] * 15 + [(4032, 3024)] * 20 + [(3000, 3000)] * 5
SMALL = [(600, 800)] * 25 + [(800, 600)] * 25


def test_of_different_shapes_the_nearest_counts_whatever_the_size() -> None:
    rng = random.Random(0)
    shapes = [(rng.randint(50, 4000), rng.randint(50, 4000)) for _ in range(500)] + [(1000, 1000), (64, 64)]
    for sizes in ([(1024, 704), (704, 1024), (832, 832)], [(1024, 704), (704, 1024)], [(512, 512), (1024, 704)]):
        ratios = [math.log(h / w) for h, w in sizes]
        alone = [min(range(len(sizes)), key=lambda i: abs(ratios[i] - math.log(h / w))) for h, w in shapes]
        assert nearest(shapes, sizes).tolist() == alone
    assert nearest([], [(64, 64), (64, 128)]).tolist() == []


def test_of_one_shape_the_largest_that_enlarges_nothing_counts() -> None:
    sizes = [(512, 512), (1024, 1024), (960, 640), (640, 448), (256, 256)]
    shapes = [(3000, 2900), (1024, 1024), (1023, 1100), (511, 600), (100, 100), (6000, 4000), (800, 600), (60, 42)]
    assert [sizes[i] for i in nearest(shapes, sizes)] == [
        (1024, 1024), (1024, 1024), (512, 512), (256, 256), (256, 256), (960, 640), (640, 448), (640, 448)]  # fmt: skip


def enlarged(shapes: list[Size], sizes: list[Size]) -> int:
    found = [sizes[i] for i in nearest(shapes, sizes)]
    return sum(h < high or w < wide for (h, w), (high, wide) in zip(shapes, found, strict=True))


@pytest.mark.parametrize("area", [(1024, 1024), (1024, 704), (512, 512), (96, 96)])
@pytest.mark.parametrize("shapes", [CAMERAS, CAMERAS + SMALL, SMALL])
def test_few_resolutions_are_chosen_and_no_photograph_is_enlarged(shapes: list[Size], area: Size) -> None:
    found = choose(shapes, area)
    assert 1 <= len(found) <= MOST and len(set(found)) == len(found)
    side = math.sqrt(math.prod(area))
    for height, width in found:
        assert height % 64 == width % 64 == 0 and height * width <= math.prod(area)
        assert side / 2 <= min(height, width) and max(height, width) <= 2 * side
    assert enlarged(shapes, found) == 0
    counts = np.bincount(nearest(shapes, found), minlength=len(found)).tolist()
    assert counts == sorted(counts, reverse=True) and counts[-1] > 0
    mixed = shapes.copy()
    random.Random(1).shuffle(mixed)
    assert choose(mixed, area) == found


def test_what_is_chosen_fits_the_photographs() -> None:
    assert choose([(4000, 6000)] * 9, (1024, 1024)) == [(832, 1216)]
    assert choose([(1024, 1024)] * 9, (1024, 1024)) == [(1024, 1024)]
    assert choose([(1000, 700)] * 9, (1024, 1024)) == [(960, 640)]  # 1024x704 would enlarge them
    upright, lying = (704, 1024), (1024, 704)
    assert choose(CAMERAS, (1024, 704)) == [upright, lying, (832, 832)]
    # 3:2, 4:3 and small, upright and lying: none is half-way between two of these.
    shapes = {(832, 1216), (896, 1152), (576, 768)}
    assert {*choose(CAMERAS + SMALL, (1024, 1024))} == shapes | {(w, h) for h, w in shapes}


def test_one_small_photograph_among_hundreds_is_worth_no_compilation() -> None:
    assert choose([(4000, 6000)] * 500 + [(500, 500)], (1024, 1024)) == [(832, 1216)]


def test_photographs_that_all_resolutions_enlarge_get_one_of_their_shape() -> None:
    (found,) = choose([(200, 300)] * 3, (1024, 1024))
    assert found == (512, 768)


def test_many_shapes_are_seen_by_some(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(2)
    shapes = [(rng.randint(1000, 1100), rng.randint(1500, 1600)) for _ in range(300)]
    found = choose(shapes, (1024, 704))
    monkeypatch.setattr("hgdpo_jax.data.resolutions._LOOKED_AT", 30)
    assert choose(shapes, (1024, 704)) == found


def test_an_area_below_a_step_is_refused() -> None:
    with pytest.raises(UserError, match=r"config key data\.area=63x64: is too small for sides in steps of 64 pixels"):
        choose([(100, 100)], (63, 64))
    assert name_of((1024, 704)) == "1024x704"
