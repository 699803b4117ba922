"""Personalised generation, with stand-ins for the networks."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from hgdpo_jax.data.photographs import Photograph
from hgdpo_jax.faces.embedding import Embedded
from hgdpo_jax.scoring import personalised
from hgdpo_jax.scoring.personalised import PeoplePictures, PersonalisedDrawing, lines, measures


@pytest.mark.parametrize("few", [1, 2, 5])
def test_people_are_compared_with_themselves_and_the_one_before_however_many_are_drawn_at_once(
    tmp_path: Path, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(personalised, "KEPT", 3)
    greys, batches = np.array([10, 30, 60, 100, 150]), []
    people = [Photograph(str(i), tmp_path / f"{i}.png", f"{i}, smiling") for i in range(5)]
    for photograph, grey in zip(people, greys, strict=True):
        Image.new("RGB", (4, 4), (int(grey),) * 3).save(photograph.picture)

    def concept(images: np.ndarray) -> np.ndarray:
        return images.mean((1, 2, 3))[:, None]

    class FakeSampler:
        """Draws a person's grey, a little lighter with the second prompt."""

        def tokenize(self, prompts: list[str]) -> np.ndarray:
            return np.array([[int(p[0]), "beach" in p] for p in prompts])

        def whole_batches(self, each: int) -> int:
            return few

        def use_policies(self, policy: str) -> None:
            self.lighter = {"base": 0.1, "hard": 0.2}[policy]

        def keys(self, stream: str, ids: list[str], numbers: list[int]) -> np.ndarray:
            return np.array(numbers)

        def generate(self, ids: np.ndarray, keys: np.ndarray, size: tuple[int, int], note: str, concept: np.ndarray):
            assert size == (4, 4) and np.array_equal(ids[:, 1], keys)
            batches.append(len(ids))
            return concept[:, 0] + self.lighter * keys

        def decode(self, latents: np.ndarray, note: str) -> np.ndarray:
            return np.broadcast_to(latents[:, None, None, None], (len(latents), 4, 4, 3))

    found = PersonalisedDrawing(
        FakeSampler(),
        lambda images: SimpleNamespace(features=concept(images)),
        SimpleNamespace(
            embed=lambda images: Embedded(concept(images), np.ones(len(images), bool), np.ones(len(images))),
            distance=lambda a, b: np.abs(a - b)[:, 0],
        ),
        people,
        (4, 4),
        ["{subject}", "{subject} on a beach"],
    ).draw({"base": ["base"], "hard": ["hard"]})
    values = greys / 127.5 - 1.0
    for name, lighter in (("base", 0.1), ("hard", 0.2)):
        drawn = values[:, None] + lighter * np.arange(2)
        assert np.allclose(found[name].distance, np.broadcast_to([0.0, lighter], (5, 2)), atol=1e-6)
        assert np.allclose(found[name].to_other, np.abs(drawn - np.roll(values, 1)[:, None]), atol=1e-6)
        assert found[name].found.all() and np.allclose(found[name].pictures[:, 0, 0, 0], drawn.ravel()[:6], atol=1e-6)
    assert max(batches) == 2 * few and sum(batches) == 20


def test_measures_are_of_drawings_with_a_face_and_their_errors_are_over_people() -> None:
    faces, none = np.array([[True, True], [True, False]]), np.zeros((2, 2), bool)
    distance, other, pictures = np.array([[0.1, 0.3], [0.6, 9.0]]), np.full((2, 2), 1.0), np.zeros((0, 4, 4, 3))
    models = {
        "base": PeoplePictures(distance, other, faces, pictures),
        "hard": PeoplePictures(distance + 0.1, other, faces, pictures),
        "blind": PeoplePictures(distance, other, none, pictures),
    }
    found = measures(models)
    assert found["base"]["faces_found"] == 0.75 and found["blind"]["identity_distance"] is None
    assert found["base"]["identity_distance"] == pytest.approx((0.2 + 0.6) / 2)
    assert found["base"]["identity_distance_standard_error"] == pytest.approx(0.2)
    assert found["base"]["nearer"] == pytest.approx(1.0 - 0.4) and found["hard"]["change"] == pytest.approx(0.1)
    assert found["blind"]["change"] is None and found["blind"]["change_standard_error"] is None
    base, hard, blind = lines(found)
    assert "identity distance 0.400 ± 0.200" in base and "faces in 75%" in base and "change" not in base
    assert hard.endswith("change 0.100 ± 0.000") and "identity distance –" in blind
