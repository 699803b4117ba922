"""What the embedded models learn from: framings of photographs, degraded copies, captions of the other gender."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hgdpo_jax.config import ASSETS
from hgdpo_jax.data.photographs import list_photographs
from hgdpo_jax.data.pixels import load_images
from tools.make_assets import mixture
from tools.make_assets.judge import KINDS
from tools.make_assets.measure import swapped
from tools.make_assets.photographs import SIZE, Place

PORTRAITS = ASSETS / "portraits"


def test_a_framing_stays_inside_the_image() -> None:
    image, random = Image.new("RGB", (120, 100)), np.random.default_rng(0)
    for _ in range(100):
        at = mixture.framed(Place(115.0, 5.0, 98.0, 0.1), image, random)
        assert at.side <= 100
        assert at.side / 2 <= at.x <= 120 - at.side / 2 and at.side / 2 <= at.y <= 100 - at.side / 2


def test_framings_are_of_all_photographs_in_turn_with_their_captions(tmp_path: Path) -> None:
    photographs = list_photographs(PORTRAITS, "train")[:2]
    lines = mixture.framings(PORTRAITS / "photographs", photographs, 5, tmp_path / "framings")
    assert [line["caption"] for line in lines] == [photographs[i % 2].caption for i in range(5)]
    assert len({line["file"] for line in lines}) == 5 and {line["split"] for line in lines} == {"base"}
    images = [np.asarray(Image.open(tmp_path / line["file"]), np.float32) for line in lines]
    assert all(image.shape == (SIZE, SIZE, 3) for image in images)
    assert np.abs(images[0] - images[2]).mean() > 1.0  # another framing of the same photograph


@pytest.mark.parametrize("degrade", sorted({d for kind in KINDS for d in kind.degradations}, key=lambda d: d.__name__))
def test_a_degradation_grows_from_nothing(degrade) -> None:
    first, other = load_images(list_photographs(PORTRAITS, "train")[:2], (SIZE, SIZE))[1]
    none, half, full = (degrade(first, other, level, np.random.default_rng(3)) for level in (0.0, 0.5, 1.0))
    assert none.shape == first.shape and np.abs(none - first).mean() < 0.02  # rounding to 8 bits or 24 tones
    if degrade.__name__ != "_none":
        assert 0.02 < np.abs(half - first).mean() < np.abs(full - first).mean()


def test_judges_see_other_people_and_other_degradations() -> None:
    one, other = KINDS
    assert one.tower != other.tower and one.degradations != other.degradations and one.seed != other.seed
    assert one.people.stop <= other.people.start


def test_swapped_captions_name_the_other_gender() -> None:
    assert swapped("a photograph of a young woman, smiling") == "a photograph of a young man, smiling"
    assert swapped("a photograph of an older man, neutral") == "a photograph of an older woman, neutral"
