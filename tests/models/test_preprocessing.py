"""Images as CLIP's towers read them, against transformers' image processor."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessor

from hgdpo_jax.models.clip import CLIPModel
from hgdpo_jax.models.convert import folder_hash, load_model
from hgdpo_jax.models.preprocessing import CLIP, clip_pixels, read_preprocessing
from hgdpo_jax.run.errors import UserError
from tests import tiny
from tests.rounding import EPS, assert_close

SIDE = 32
SIZE = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
HALF = {"image_mean": [0.5, 0.4, 0.5], "image_std": [0.5, 0.5, 0.6]}


def random_image(height: int, width: int) -> np.ndarray:
    """Within 0…255 after each pass: the processor cuts off between its two passes, this port after both."""
    noise = np.random.default_rng(0).uniform(60, 190, (8, 6, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BILINEAR))


def both(folder: Path, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the processor in a folder makes of an image, and what is computed here."""
    processor = CLIPImageProcessor.from_pretrained(folder)
    expected = processor(Image.fromarray(image), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    how = read_preprocessing(folder, SIDE)
    return expected, np.asarray(clip_pixels(jnp.asarray(image[None] / 127.5 - 1.0, jnp.float32), SIDE, how))[0]


@pytest.mark.parametrize(
    "settings", [{}, HALF, {"do_normalize": False}, {"resample": 2}, {"resample": 1}, {"size": {"shortest_edge": 40}}]
)
def test_preprocessing_is_that_of_the_image_processor(settings: dict, tmp_path: Path) -> None:
    CLIPImageProcessor(**SIZE | settings).save_pretrained(tmp_path)
    expected, found = both(tmp_path, random_image(96, 72))
    assert np.abs(found - expected).max() < 0.02  # the processor rounds to 8 bits: half a step is 0.0075
    if "shortest_edge" in settings.get("size", {}):
        return
    expected, found = both(tmp_path, random_image(SIDE, SIDE))  # nothing is resized or rounded
    assert_close(found, expected, 16 * EPS)


def test_it_is_read_where_transformers_reads_it(tmp_path: Path) -> None:
    assert read_preprocessing(tmp_path, SIDE) == CLIP
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": SIDE, "crop_size": SIDE, **HALF}))
    older = read_preprocessing(tmp_path, SIDE)
    assert older.mean == (0.5, 0.4, 0.5) and older.std == (0.5, 0.5, 0.6) and older.short is None
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "CLIPProcessor"}))
    assert read_preprocessing(tmp_path, SIDE) == older
    nested = {"image_processor": {**SIZE, "image_mean": [0.1, 0.2, 0.3]}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert read_preprocessing(tmp_path, SIDE).mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("size", {"height": SIDE, "width": SIDE}),
        ("size", 16),
        ("size", "32"),
        ("crop_size", {"height": SIDE, "width": 48}),
        ("crop_size", 64),
        ("do_resize", False),
        ("do_center_crop", False),
        ("do_rescale", False),
        ("rescale_factor", 1 / 127.5),
        ("rescale_factor", None),
        ("resample", 0),
        ("resample", [3]),
        ("image_mean", 0.5),
        ("image_std", [0.5, 0.5, 0.0]),
        ("image_std", [0.5, 0.5, -0.5]),
        ("image_std", [0.5, 0.5, float("nan")]),
        ("image_mean", [0.5, True, 0.5]),
        ("size", 10**9),
    ],
)
def test_what_is_not_computed_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(SIZE | {key: value}))
    with pytest.raises(UserError, match=f"{path}: .*{key}=") as error:
        read_preprocessing(tmp_path, SIDE)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["[]", '{"image_processor": null}', "{", '{"image_processor": 3}'])
def test_a_broken_file_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "processor_config.json").write_text(content)
    with pytest.raises(UserError, match=f"{tmp_path / 'processor_config.json'}: "):
        read_preprocessing(tmp_path, SIDE)


def test_another_preprocessing_is_another_scorer(tmp_path: Path) -> None:
    before = folder_hash(tiny.write_scorer(tmp_path))
    CLIPImageProcessor(**SIZE).save_pretrained(tmp_path)
    assert folder_hash(tmp_path) == before
    CLIPImageProcessor(**SIZE, **HALF).save_pretrained(tmp_path)
    assert folder_hash(tmp_path) != before


def test_a_scorer_without_an_image_size_is_refused(tmp_path: Path) -> None:
    path = tiny.write_scorer(tmp_path) / "config.json"
    config = json.loads(path.read_text())
    config["vision_config"]["image_size"] = None
    path.write_text(json.dumps(config))
    assert folder_hash(tmp_path)  # which is asked for first
    with pytest.raises(UserError, match=f"^{path}: CLIPModel config: its values make no model"):
        load_model(CLIPModel, tmp_path)
