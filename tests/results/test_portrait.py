"""The pictures to look at, and pairs for a reader who does not know which is which."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.pictures import PAIRS, SCALE, SPACE, pairs
from hgdpo_jax.pictures.sheet import GAP, sheet
from hgdpo_jax.results import portrait
from hgdpo_jax.scoring.personalised import PeoplePictures

RNG = np.random.default_rng(0)


def cells(picture: np.ndarray, rows: int, columns: int, height: int, width: int) -> np.ndarray:
    """The pictures of a sheet, [rows, columns, height, width, 3], and its label column."""
    left = picture.shape[1] - columns * (width + GAP)
    grid = picture[GAP:, left:].reshape(rows, height + GAP, columns, width + GAP, 3).swapaxes(1, 2)
    assert (grid[:, :, height:] == 255).all() and (grid[:, :, :, width:] == 255).all() and (picture[:GAP] == 255).all()
    labels = picture[GAP:, :left].reshape(rows, height + GAP, left, 3)
    assert (labels[:, :, :GAP] == 255).all() and (labels.min((1, 2, 3)) < 50).all()  # written, and not cut off
    assert (labels[:, :, -1] == 255).all()
    return grid[:, :, :height, :width]


@pytest.mark.parametrize("height, width, scale", [(24, 20, 2), (255, 30, 2), (30, 256, 1)])
def test_rows_are_labelled_and_pixels_enlarged_without_smoothing(height: int, width: int, scale: int) -> None:
    rows = {name: RNG.integers(0, 256, (3, height, width, 3), np.uint8) for name in ("base", "hard + text encoder")}
    found = cells(sheet(rows), 2, 3, scale * height, scale * width)
    assert np.array_equal(found, np.stack([*rows.values()]).repeat(scale, 2).repeat(scale, 3))


def numbered(count: int) -> np.ndarray:
    """Pictures of 16x16 pixels, each of its number."""
    return np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 16, 16, 3))


@pytest.mark.parametrize(
    "captions, shown",
    [
        ("aabacdefghijklmnopqr", [0, 2, *range(4, 14)]),  # different ones
        ("abcdefghijkaaaaaaaaa", [*range(12)]),  # not as many
        ("aab", [0, 1, 2]),
    ],
)
def test_the_portrait_has_twelve_captions_different_ones_if_it_can(
    tmp_path: Path, captions: str, shown: list[int]
) -> None:
    portrait.write(tmp_path, {"base": numbered(len(captions)), "easy": 200 + numbered(len(captions))}, [*captions])
    found = cells(np.asarray(Image.open(tmp_path / "portrait.png")), 2, len(shown), 32, 32)
    assert np.array_equal(found[:, :, 0, 0, 0], [shown, [200 + i for i in shown]])


def test_people_are_shown_with_their_photograph_and_each_models_first_drawing(tmp_path: Path) -> None:
    """As many as all models' drawings stayed of."""
    none, photographs = np.zeros((10, 2)), numbered(10) / np.float32(127.5) - 1
    drawn = {name: numbered(count) / np.float32(127.5) - 1 for name, count in (("base", 20), ("hard", 12))}
    people = {name: PeoplePictures(none, none, none > 0, pictures) for name, pictures in drawn.items()}
    portrait.write_people(tmp_path, people, photographs, 2)
    found = cells(np.asarray(Image.open(tmp_path / "persons.png")), 3, 6, 32, 32)
    assert np.array_equal(found[:, :, 0, 0, 0], [range(6), range(0, 12, 2), range(0, 12, 2)])
    portrait.write_people(tmp_path, {}, photographs, 2)
    assert not (tmp_path / "persons.png").exists()


def test_the_key_says_where_the_second_model_is(tmp_path: Path) -> None:
    (tmp_path / "evaluation").mkdir()
    for name, first in (("naive", 0), ("hard", 100)):
        np.savez(tmp_path / "evaluation" / f"{name}.npz", pictures=first + numbered(PAIRS + 1))
    pairs(tmp_path, "naive", "hard", tmp_path / "out")
    key = json.loads((tmp_path / "out" / "key.json").read_text())
    side = 16 * SCALE
    columns = np.asarray(Image.open(tmp_path / "out" / "pairs.png")).reshape(5, side + SPACE, 4, 2 * (side + SPACE), 3)
    middle = columns[:, side // 2, :, :, 0].reshape(PAIRS, -1)
    halves = np.stack([middle[:, SPACE + side // 2], middle[:, SPACE + side + side // 2]], 1)
    for i, half in enumerate(halves.tolist()):
        assert half == ([100 + i, i] if key[str(i + 1)] == "left" else [i, 100 + i])
    assert len(key) == PAIRS and set(key.values()) == {"left", "right"}
