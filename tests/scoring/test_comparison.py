"""Measures of models whose pictures are known."""

import numpy as np
import pytest

from hgdpo_jax.scoring.comparison import METRICS, compare, differences, to_json

RNG = np.random.default_rng(0)


def seen() -> dict[str, np.ndarray]:
    """Of four people, one picture each."""
    return {
        "score": np.array([[1.0], [2.0], [3.0], [4.0]]),
        "second_score": np.zeros((4, 1)),
        "third_score": np.zeros((4, 1)),
        "embedding": RNG.standard_normal((4, 1, 3)),
        "face_embedding": RNG.standard_normal((4, 1, 3)),
        "inception_features": RNG.standard_normal((4, 1, 5)),
        "dinov2_features": RNG.standard_normal((4, 1, 3)),
        "cmmd_features": RNG.standard_normal((4, 1, 3)),
        "face_found": np.array([[1.0], [0.0], [1.0], [0.0]]),
        "face_score": np.full((4, 1), 0.5),
        "sharpness": np.array([[1.0], [1.0], [1.0], [5.0]]),
        "hue": np.tile([1.0, 0.0], (4, 1, 1)),
    }


def test_metrics_of_a_model_against_base() -> None:
    base = seen()
    better = base | {
        "score": np.array([[2.0], [2.0], [4.0], [3.0]]),
        "second_score": np.array([[1.0], [1.0], [1.0], [-1.0]]),
        "third_score": np.array([[3.0], [-1.0], [-1.0], [-1.0]]),
        "embedding": base["embedding"] + np.array([2.0, 0, 0]),
        "inception_features": base["inception_features"] + np.array([0, 3.0, 0, 0, 0]),
        "face_found": np.ones((4, 1)),
        "hue": np.tile([0.0, 1.0], (4, 1, 1)),
    }
    compared = compare({"base": base, "easy": better}, base)
    found = {name: {key: measure.value for key, measure in row.items()} for name, row in compared.items()}
    assert found["base"]["win_rate"] == found["base"]["second_win_rate"] == 0.5 and found["base"]["hue_distance"] == 0
    assert found["easy"]["win_rate"] == pytest.approx((1 + 0.5 + 1 + 0) / 4)
    assert found["easy"]["second_win_rate"] == pytest.approx(3 / 4)
    assert (found["easy"]["third_win_rate"], found["easy"]["third_score"]) == (1 / 4, 0.0)
    assert found["easy"]["preference_score"] == 2.75
    assert found["easy"]["frechet_distance"] == pytest.approx(4.0)
    assert found["easy"]["face_frechet_distance"] == pytest.approx(0.0, abs=1e-6)
    assert found["easy"]["fid"] == pytest.approx(9.0) and found["easy"]["kid"] > 500 * 9.0 / 5
    assert found["easy"]["fd_dinov2"] == pytest.approx(0.0, abs=1e-6) and found["easy"]["cmmd"] == pytest.approx(0.0)
    assert (found["base"]["faces_found"], found["easy"]["faces_found"]) == (0.5, 1.0)
    assert found["easy"]["hue_distance"] == pytest.approx(90.0)
    assert found["easy"]["sharpness"] == 2.0
    assert list(found["easy"]) == list(METRICS)
    more = differences(compared, [("easy", "base"), ("hard", "base")])
    assert list(more) == ["easy - base"] and more["easy - base"]["faces_found"].value == 0.5
    written = to_json(more["easy - base"])
    assert set(written) == set(METRICS) | {f"{name}_interval" for name in METRICS}
    low, high = written["faces_found_interval"]
    assert low < 0.5 < high


@pytest.mark.parametrize("other", ["second", "third"])
def test_without_another_scorer_its_measures_are_left_out(other: str) -> None:
    model = {key: value for key, value in seen().items() if key != f"{other}_score"}
    assert set(METRICS) - set(compare({"base": model}, model)["base"]) == {f"{other}_score", f"{other}_win_rate"}
