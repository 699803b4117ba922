"""What the judges see, and views of photographs."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from hgdpo_jax.data.photographs import Photograph
from hgdpo_jax.faces.embedding import Embedded
from hgdpo_jax.run.places import Place, places
from hgdpo_jax.scoring import judges
from hgdpo_jax.scoring.judges import VIEWS, Judges, views
from hgdpo_jax.scoring.preference import Judgement
from hgdpo_jax.scoring.scorers import Scorer
from tests import tiny


@pytest.mark.parametrize("second, third, more", [("2", "3", ""), ("2", "", "hps=4,clip_score=5"), ("", "3", "hps=4")])
def test_each_scorer_says_its_own_and_an_absent_one_nothing(
    second: str, third: str, more: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With scorers that say the number that their folder is named; of several that chose the first is asked."""

    def scorer(place: Place, mesh: object) -> Scorer:
        said = np.float32(place.path)
        return Scorer(place.name, lambda images, ids: Judgement(np.full(len(images), said), np.zeros((len(images), 1))))

    faces = Embedded(np.zeros((2, 1)), np.ones(2, bool), np.ones(2))
    monkeypatch.setattr(judges, "open_scorer", scorer)
    monkeypatch.setattr(judges, "FaceEmbedder", lambda: SimpleNamespace(embed=lambda images: faces))
    seen = Judges("1,9", second, third, more, tiny.mesh())(
        np.zeros((2, 8, 8, 3), np.float32), np.zeros((2, 3), np.int32)
    )
    scores = {name: list(value) for name, value in seen.items() if "score" in name and name != "face_score"}
    expected = {"score": "1", "second_score": second, "third_score": third}
    expected |= {f"scored_{place.name}": place.path for place in places(more)}
    assert scores == {name: [float(folder)] * 2 for name, folder in expected.items() if folder}


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
