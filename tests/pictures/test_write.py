"""Pictures side by side, and what a file says of how it was made."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from hgdpo_jax.pictures.write import contact_sheet, grid, jpeg, png, to_uint8, write_png


def test_pictures_are_laid_out_row_by_row() -> None:
    images = np.stack([np.full((2, 3, 3), v, np.float32) for v in (-1, 0, 1)])
    picture = grid(images, 2)
    assert picture.shape == (4, 6, 3)
    assert (picture[:2, :3] == 0).all() and (picture[:2, 3:] == 128).all() and (picture[2:] == 255).all()
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png(picture)))), picture)
    assert Image.open(io.BytesIO(jpeg(picture))).format == "JPEG"
    assert to_uint8(np.full((1, 1, 3), 1.3)).tolist() == [[[255] * 3]]  # not 37


def test_a_picture_says_how_it_was_made_and_a_sheet_shows_many(tmp_path: Path) -> None:
    settings, paths = {"prompt": "a woman, smiling", "steps": 50, "seed": 3}, []
    for i, (height, width) in enumerate([(8, 4), (4, 8), (4, 4)]):
        paths.append(tmp_path / f"{i}.png")
        write_png(paths[-1], np.full((height, width, 3), 80 * i, np.uint8), settings if i == 0 else {})
    with Image.open(paths[0]) as made, Image.open(paths[1]) as plain:
        assert made.text["parameters"] == "a woman, smiling\nSteps: 50, Seed: 3" and not plain.text
        assert json.loads(made.text["hgdpo_jax"]) == settings
    sheet = contact_sheet(paths, 2, side=4)
    assert sheet.shape == (8, 8, 3)
    assert (sheet[:4, :2] == 0).all() and (sheet[:2, 4:] == 80).all() and (sheet[4:, :4] == 160).all()
    assert (sheet[:4, 2:4] == 255).all() and (sheet[4:, 4:] == 255).all()
