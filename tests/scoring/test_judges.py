"""Views of photographs."""

from pathlib import Path

import numpy as np

from hgdpo_jax.data.photographs import Photograph
from hgdpo_jax.scoring.judges import VIEWS, views


def test_views_of_a_photograph_are_its_own_cut_near_it_and_half_of_them_mirrored() -> None:
    a, b = (Photograph(name, Path(name), "") for name in "ab")
    left_to_right = np.broadcast_to(np.linspace(-1, 1, 24, dtype=np.float32)[:, None], (16, 24, 3))
    both, alone = views([a, b], np.stack([left_to_right] * 2)), views([b], left_to_right[None])
    assert both.shape == (2, VIEWS, 16, 24, 3) and np.array_equal(both[1:], alone)
    assert not np.allclose(both[0, 1], both[1, 1]) and np.array_equal(both[0, 0], left_to_right)
    rises = both[:, :, :, -1].mean((2, 3)) > both[:, :, :, 0].mean((2, 3))
    assert (rises == (np.arange(VIEWS) % 2 == 0)).all()
    ranges = np.abs(both[:, 1:, :, -1] - both[:, 1:, :, 0]).mean((2, 3)) / 2
    assert ((ranges > 0.83) & (ranges < 1.01)).all() and ranges.std() > 0.01
