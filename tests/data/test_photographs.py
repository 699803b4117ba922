"""Photographs: which ones, how they are cut, and what is wrong with them."""

import gc
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hgdpo_jax.config import ASSETS
from hgdpo_jax.data.photographs import Photograph, list_photographs, sort_by_shape
from hgdpo_jax.data.pixels import load_images
from hgdpo_jax.run.errors import UserError
from tests import tiny


def test_the_embedded_portraits_are_whole() -> None:
    train, heldout = (list_photographs(ASSETS / "portraits", split) for split in ("train", "heldout"))
    assert (len(train), len(heldout)) == (108, 40)
    assert sum(p.picture.stem.endswith("f") for p in heldout) == 20
    readable, images = load_images(train + heldout, (64, 64))
    assert len(readable) == 148 and images.shape == (148, 64, 64, 3)
    assert sum(f.stat().st_size for f in ASSETS.rglob("*") if f.is_file()) <= 30e6


def test_mirror_images_follow_their_photograph(tmp_path: Path) -> None:
    found = list_photographs(tiny.write_photographs(tmp_path / "p", 2), "train", mirror=True)
    assert [p.mirrored for p in found] == [False, True, False, True]
    _, images = load_images(found, (64, 64))
    assert np.array_equal(images[1], images[0][:, ::-1])


def test_an_image_covers_the_resolution_and_is_cut_to_its_centre(tmp_path: Path) -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    Image.fromarray(wide).save(tmp_path / "a.png")
    _, images = load_images([Photograph("a", tmp_path / "a.png", "")], (10, 10))
    assert np.array_equal(images[0], np.ones((10, 10, 3), np.float32))


def test_an_unreadable_photograph_is_named_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    photographs = list_photographs(tiny.write_photographs(tmp_path / "p", 3), "train")
    photographs[1].picture.write_bytes(b"not an image")
    with caplog.at_level(logging.WARNING):
        readable, images = load_images(photographs, (64, 64))
    assert [p.id for p in readable] == [photographs[0].id, photographs[2].id] and len(images) == 2
    assert str(photographs[1].picture) in caplog.text


def test_what_is_wrong_with_the_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder; set --config.data.photographs"):
        list_photographs(tmp_path / "nowhere", "train")
    with pytest.raises(UserError, match=r"expects images with \.txt files beside them, captions\.jsonl"):
        list_photographs(tmp_path, "train")
    (tmp_path / "captions.jsonl").write_text('{"file": "a.jpg", "caption": "x"}\n{"file": "b.jpg"}\n')
    with pytest.raises(UserError, match="line 2: expects"):
        list_photographs(tmp_path, "train")
    (tmp_path / "captions.jsonl").write_text('{"file": "a.jpg", "caption": "x", "split": "test"}\n')
    with pytest.raises(UserError, match="split 'test' is not one of"):
        list_photographs(tmp_path, "train")
    (tmp_path / "captions.jsonl").write_text('{"file": "a.jpg", "caption": "x", "split": "train"}\n')
    with pytest.raises(UserError, match="none of the 1 is of split heldout; mark some as heldout"):
        list_photographs(tmp_path, "heldout")
    assert gc.isenabled()  # again


def test_a_photograph_goes_to_the_resolution_nearest_in_shape(tmp_path: Path) -> None:
    sizes = {"tall": (20, 30), "wide": (40, 20), "square": (30, 29), "turned": (40, 20)}
    photographs = []
    for name, size in sizes.items():
        exif = Image.Exif()
        exif[0x0112] = 6 if name == "turned" else 1  # a camera held upright
        Image.new("RGB", size).save(tmp_path / f"{name}.jpg", exif=exif)
        photographs.append(Photograph(name, tmp_path / f"{name}.jpg", ""))
    photographs.append(Photograph("missing", tmp_path / "missing.jpg", ""))
    resolutions = {"64x64": (64, 64), "128x64": (128, 64), "64x128": (64, 128)}
    found = {name: [p.id for p in bucket] for name, bucket in sort_by_shape(photographs, resolutions).items()}
    assert found == {"64x64": ["square", "missing"], "128x64": ["tall", "turned"], "64x128": ["wide"]}


def test_every_line_is_an_example_of_its_own(tmp_path: Path) -> None:
    folder = tiny.write_photographs(tmp_path / "p", 2)
    line = json.loads((folder / "captions.jsonl").read_text().splitlines()[0])
    with (folder / "captions.jsonl").open("a") as file:
        file.write(json.dumps(line | {"caption": "another caption"}) + "\n")
    found = list_photographs(folder, "train", mirror=True)
    name = line["file"]
    assert [p.id for p in found if p.picture.name in name] == [
        name,
        f"{name}#mirrored",
        f"{name}#2",
        f"{name}#2#mirrored",
    ]
    assert [p.caption for p in found][-2:] == ["another caption"] * 2
    with (folder / "captions.jsonl").open("a") as file:
        file.write(json.dumps({"file": f"{name}#2", "caption": "x"}) + "\n")
    with pytest.raises(UserError, match=f"{name}#2 names two examples"):
        list_photographs(folder, "train")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_list_as_other_programs_write_it_is_read(tmp_path: Path, encoding: str) -> None:
    text = '{"file": "a.jpg", "caption": "two\u2028lines"}\r\n\n  \n{"file": "b.jpg", "caption": "ö"}\n'
    (tmp_path / "captions.jsonl").write_bytes(text.encode(encoding))
    found = list_photographs(tmp_path, "train")
    assert [p.caption for p in found] == ["two\u2028lines", "ö"] and found[0].id == "a.jpg"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"file": "a.jpg", "caption": "x"}\n{"file": "b.jpg", "caption": "ö"}'.encode("latin-1"),
            "line 2: is not UTF-8",
        ),
        ('{"file": "a.jpg", "caption": "x"}'.encode("utf-16"), "line 1: is not UTF-8"),
        (b'\n{"file": "a.jpg", "caption": null}', "line 2: expects"),
        (b'{"file": 5, "caption": "x"}', "line 1: expects"),
        (b'"a.jpg"', "line 1: expects"),
        (b"[" * 100_000, "line 1: expects"),
        (b'{"file": "a.jpg", "caption": "x", "split": ["train"]}', "is not one of base, train, heldout"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "captions.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        list_photographs(tmp_path, "train")
    assert str(tmp_path / "captions.jsonl") in str(error.value) and "\n" not in str(error.value)


def test_of_photographs_that_are_all_marked_train_some_are_held_out(tmp_path: Path) -> None:
    """As in a dataset whose only file is called train-00000-of-00001."""
    folder = tiny.write_photographs(tmp_path / "photographs", train=6, heldout=0)
    assert {p.split for p in list_photographs(folder, "train", "heldout", heldout=0.0)} == {"train"}
    found = list_photographs(folder, "train", "heldout", heldout=0.5)
    assert [p.split for p in found].count("heldout") == 3
    lines = (folder / "captions.jsonl").read_text().splitlines()
    (folder / "captions.jsonl").write_text("\n".join([*lines[:-1], lines[-1].replace('"train"', '"heldout"')]) + "\n")
    found = list_photographs(folder, "train", "heldout", heldout=0.5)
    assert [p.split for p in found] == ["train"] * 5 + ["heldout"]
