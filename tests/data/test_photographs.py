"""Photographs: which ones, how they are cut, and what is wrong with them."""

import gc
import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from hgdpo_jax.config import ASSETS, default, resolutions
from hgdpo_jax.data import shards
from hgdpo_jax.data.photographs import Photograph, list_all, list_examples, list_photographs, sort_by_shape
from hgdpo_jax.data.pixels import load_images
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import file_hash
from hgdpo_jax.run.index import Index
from tests import tiny


def test_the_embedded_portraits_are_whole() -> None:
    train, heldout = (list_photographs(ASSETS / "portraits", split) for split in ("train", "heldout"))
    assert (len(train), len(heldout)) == (108, 40)
    assert sum(p.picture.stem.endswith("f") for p in heldout) == 20
    readable, images = load_images(train + heldout, (64, 64))
    assert len(readable) == 148 and images.shape == (148, 64, 64, 3)
    assert sum(f.stat().st_size for f in ASSETS.rglob("*") if f.is_file()) <= 42e6


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
    for place in (tmp_path / "nowhere", tmp_path / ("x" * 300), tmp_path / "a\0b"):
        with pytest.raises(UserError, match="no such file or folder; set --config.data.photographs"):
            list_photographs(place, "train")
    for given, key in ((False, "data.photographs"), (True, "data.pairs")):
        with pytest.raises(UserError, match=f"config key {key}: is empty; set it to"):
            list_photographs("", "train", given=given)
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


def listed(folder: Path, *lines: tuple[str, str | None]) -> Path:
    """A list of (file, split), each line with a caption of its own."""
    folder.mkdir(exist_ok=True)
    entries = [{"file": file, "caption": f"caption {i}", "split": split} for i, (file, split) in enumerate(lines)]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, entries)))
    return folder


@pytest.mark.parametrize(
    "lines",
    [
        [("a.png", "train"), ("a.png", "heldout")],
        [("a.png", "heldout"), ("b.png", "train"), ("a.png", None), ("a.png", "train")],
        [("a.png", "base"), ("a.png", "train"), ("b.png", "heldout")],
        [("a.png", "train"), ("./a.png", "heldout")],
        [("c/../a.png", "heldout"), ("a.png", "base")],
        [("a.png", "train"), ("b//a.png", "heldout"), ("b/a.png", "train")],
    ],
)
def test_a_photograph_whose_captions_disagree_on_the_split_is_refused(
    tmp_path: Path, lines: list[tuple[str, str | None]]
) -> None:
    with pytest.raises(UserError, match=r"a\.png is marked as \w+ and as \w+; mark all captions of a photograph alike"):
        list_photographs(listed(tmp_path, *lines), "train", "heldout", "base")


def test_of_a_photograph_all_captions_are_in_one_split(tmp_path: Path) -> None:
    """Those without a mark go with those that have one; where nothing is marked, other names of a file, and copies of
    it, go together."""
    place = listed(tmp_path, ("a.png", None), ("b.png", "train"), ("./a.png", "heldout"), ("a.png", None))
    found = list_photographs(place, "train", "heldout")
    assert [(p.id, p.split) for p in found] == [
        ("a.png", "heldout"), ("b.png", "train"), ("./a.png", "heldout"), ("a.png#2", "heldout")]  # fmt: skip
    for i in range(6):
        for copy in ("", "copy"):
            Image.new("RGB", (2, 2), (i, 0, 0)).save(tmp_path / f"{i}{copy}.png")
    place = listed(tmp_path, *((name, None) for i in range(6) for name in (f"{i}.png", f"{i}copy.png", f"./{i}.png")))
    found = list_photographs(place, "train", "heldout", heldout=0.4)
    splits = [{p.split for p in found if str(i) in p.id} for i in range(6)]
    assert sorted(map(tuple, splits)) == [("heldout",)] * 3 + [("train",)] * 3
    assert len(found) == 18


HALF = "\ud83d"  # of an emoji: a caption that was cut at a number of UTF-16's units


@pytest.mark.parametrize("caption", [f"a woman {HALF}", f"{HALF}", "\udfff a man"])
def test_half_an_emoji_is_refused(tmp_path: Path, caption: str) -> None:
    (tmp_path / "captions.jsonl").write_text(json.dumps({"file": "a.png", "caption": caption}))
    (tmp_path / "meta.json").write_text(json.dumps({"b.png": {"tags": caption}}))
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"winner": "c.png", "loser": "d.png", "caption": caption}))
    for place, given, name in ((tmp_path, False, "a.png"), (tmp_path / "meta.json", False, "b.png"),
                               (tmp_path / "pairs.jsonl", True, "c.png")):  # fmt: skip
        with pytest.raises(UserError, match=f"the caption of {name} holds half a character, ") as error:
            list_photographs(place, "train", given=given)
        str(error.value).encode()  # can be printed


@pytest.mark.parametrize("name", [b"caf\xe9.png", b"\xff\xfe.png", b"d\xf6rfer/a.png"])
def test_a_file_whose_name_is_not_utf8_is_read(tmp_path: Path, name: bytes) -> None:
    path = Path(os.fsdecode(bytes(tmp_path) + b"/" + name))
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (2, 2), "red").save(path)
    path.with_suffix(".txt").write_text("a woman")
    (found,) = list_photographs(tmp_path, "train", heldout=0.0)
    assert found.id == name.decode(errors="surrogateescape").encode(errors="backslashreplace").decode()
    found.id.encode()
    assert len(load_images([found], (2, 2))[0]) == 1
    assert shards.photographs_of_shard([found], Index())[0].content == file_hash(path)


def test_a_name_that_no_file_can_have_is_named_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ["a\0b.png", "x" * 300 + ".png", ".", "a.png/b.png", HALF + ".png"]
    found = list_photographs(listed(tmp_path, *((name, "train") for name in names)), "train", heldout=0.0)
    assert [entry.content for entry in shards.photographs_of_shard(found, Index())] == [None] * 5
    with caplog.at_level(logging.WARNING):
        assert load_images(found[:4], (2, 2))[0] == []  # what is logged of the last one pytest-xdist cannot pass on
    assert caplog.text.count("cannot be read (") == 4


def sized(folder: Path, *sizes: tuple[int, int]) -> ConfigDict:
    """A config of photographs of some sizes (width, height), of which the first two are held out."""
    folder.mkdir(exist_ok=True)
    for i, size in enumerate(sizes):
        Image.new("RGB", size, (i, 0, 0)).save(folder / f"{i}.png")
    listed(folder, *((f"{i}.png", "heldout" if i < 2 else "train") for i in range(len(sizes))))
    config = default()
    config.data.photographs, config.data.resolutions = str(folder), ("64x64", "128x64")
    return config


def test_small_photographs_are_counted_and_left_out_on_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """64x64 takes the square ones, 128x64 the tall ones (pictures are given as width x height)."""
    sizes = [(64, 64), (63, 70), (64, 128), (64, 127), (32, 64), (200, 200), (32, 40), (16, 16)]
    config = sized(tmp_path, *sizes)
    (tmp_path / "5.png").write_bytes(b"no image")  # which is named where it is used

    def names(smallest: float, mirror: bool = False) -> list[str]:
        config.data.smallest, config.data.mirror = smallest, mirror
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            held, train = list_examples(config, "heldout", "train", index=Index())
        return [p.id.removesuffix(".png") for p in held + train]

    assert names(0.0) == list("01234567")
    assert "5 of 8 photographs are smaller than their resolution and are enlarged" in caplog.text
    assert f"{tmp_path}/7.png the most, 4.00 times; data.smallest=1 leaves them out" in caplog.text
    assert names(0.5) == list("0123456") and "4 of 8 photographs" in caplog.text
    assert "1 of 8 photographs are smaller than data.smallest=0.5 times their resolution and are left" in caplog.text
    assert f"the first is {tmp_path}/7.png" in caplog.text
    assert names(0.6) == list("01235")
    assert names(1.0) == list("025") and "enlarged" not in caplog.text
    assert names(1.0, mirror=True)[:2] == ["0", "0.png#mirrored"] and "of 8 photographs" in caplog.text
    with pytest.raises(UserError, match=r"config key data\.smallest=1\.5: leaves none of split heldout; lower it"):
        names(1.5)
    caplog.clear()
    assert len(list_all(config, "heldout", "train", index=Index())[1]) == 8 and not caplog.text
    config.data.resolutions = ("16x16",)
    assert names(0.0) == list("01234567") and not caplog.text


def test_a_resolution_that_lies_the_wrong_way_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Pictures are given as width x height, resolutions as height x width."""
    config = sized(tmp_path, (130, 70), (130, 70), (150, 70), (90, 90))

    def warnings(*given: str) -> list[str]:
        config.data.resolutions = given
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            list_examples(config, "heldout", "train", index=Index())
        return [line for line in caplog.messages if "the height comes first" in line]

    assert warnings("128x64") == [
        "config key data.resolutions: 128x64 is 128 high and 64 wide, but none of the 4 "
        "photographs is higher than wide; the height comes first: did you mean 64x128?"
    ]
    assert len(warnings("64x64", "128x64")) == 1
    assert warnings("64x128") == warnings("64x64") == warnings("128x64", "64x128") == []
    Image.new("RGB", (70, 130)).save(tmp_path / "3.png")
    assert warnings("128x64") == []
    for i in range(4):
        Image.new("RGB", (70, 130), (i, 0, 0)).save(tmp_path / f"{i}.png")
    assert "64x128 is 64 high and 128 wide, but none of the 4 photographs is wider than high" in warnings("64x128")[0]


def test_photographs_of_other_formats_are_measured_upright(tmp_path: Path) -> None:
    """A camera's portrait is 128 high and 64 wide: large enough, and of the resolution for tall ones."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("jpg", "png", "tiff", "webp", "avif"):
        Image.new("RGB", (128, 64)).save(tmp_path / f"a.{kind}", exif=exif)
    config = sized(tmp_path, (64, 64), (64, 64))
    kinds = ["jpg", "png", "tiff", "webp", "avif"]
    listed(tmp_path, ("0.png", "heldout"), *((f"a.{kind}", "train") for kind in kinds))
    config.data.smallest = 1.0
    (found,) = list_examples(config, "train", index=Index())
    assert [p.id for p in found] == [f"a.{kind}" for kind in kinds]
    assert sort_by_shape(found, resolutions(config)) == {"64x64": [], "128x64": found}
