"""Each form in which people keep photographs is written by its own library or by hand, and read back."""

import csv
import io
import json
import logging
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from hgdpo_jax.data import shards
from hgdpo_jax.data.photographs import list_photographs
from hgdpo_jax.data.pixels import load_images
from hgdpo_jax.pictures.read import image_shape
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.index import Index
from tests import mutations
from tests.data.datasets import write_dataset
from tests.mutations import photographs as damaged_photographs

CAPTIONS = {"a": "a woman, ö", "b": "a man", "c": "a child"}


def colour(name: str) -> tuple[int, int, int]:
    return {"a": (250, 10, 10), "b": (10, 250, 10), "c": (10, 10, 250)}[name]


def png(name: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 8), colour(name)).save(buffer, "png")
    return buffer.getvalue()


def write_images(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / f"{name}.png").write_bytes(png(name))


def sidecars(folder: Path) -> Path:
    """As kohya's scripts want them, in a folder of repeats; c is held out by its folder."""
    for place, names in (("10_people", "ab"), ("val", "c")):
        write_images(folder / place, *names)
        for name in names:
            (folder / place / f"{name}.txt").write_text(f"\n{CAPTIONS[name]}\n", encoding="utf-8-sig")
    return folder


def imagefolder_jsonl(folder: Path) -> Path:
    write_images(folder, *"abc")
    lines = [{"file_name": f"{n}.png", "text": CAPTIONS[n], "split": "test" if n == "c" else "train"} for n in "abc"]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return folder


def imagefolder_csv(folder: Path) -> Path:
    for split, names in (("train", "ab"), ("validation", "c")):
        write_images(folder / split, *names)
        with (folder / split / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["file_name", "caption"])
            rows.writerows([f"{name}.png", CAPTIONS[name]] for name in names)
    return folder


def kohya(folder: Path) -> Path:
    write_images(folder / "train", *"ab")
    write_images(folder / "heldout", "c")
    entries = {"train/a.png": {"caption": CAPTIONS["a"], "tags": "other"}, "train/b": {"tags": CAPTIONS["b"]},
               "heldout/c.png": {"caption": CAPTIONS["c"]}}  # fmt: skip
    (folder / "meta.json").write_text(json.dumps(entries))
    return folder / "meta.json"


def tar(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for shard, names in (("train-000000.tar", "ab"), ("val-000000.tar", "c")):
        with tarfile.open(folder / shard, "w") as archive:
            for name in names:
                text = CAPTIONS[name].encode() if name != "b" else json.dumps({"caption": CAPTIONS[name]}).encode()
                for suffix, content in (("png", png(name)), ("json" if name == "b" else "txt", text)):
                    member = tarfile.TarInfo(f"{name}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return folder


def parquet(folder: Path) -> Path:
    (folder / "data").mkdir(parents=True)
    for split, names in (("train", "ab"), ("test", "c")):
        columns = {"image": [{"bytes": png(n), "path": f"{n}.png"} for n in names],
                   "text": [CAPTIONS[n] for n in names]}  # fmt: skip
        pq.write_table(pa.table(columns), folder / "data" / f"{split}-00000-of-00001.parquet", row_group_size=1)
    return folder


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where TFDS looks for datasets. The pictures a, b and c lie beside it."""
    write_images(tmp_path, *"abc")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path / "tfds"))
    return tmp_path / "tfds"


IMAGE, TEXT = tfds.features.Image(shape=(8, 12, 3)), tfds.features.Text()


@pytest.fixture
def dataset(datasets: Path) -> str:
    """A dataset that TFDS finds by its name."""
    rows = {split: [{"photo": datasets.parent / f"{name}.png", "text": CAPTIONS[name]} for name in names]
            for split, names in (("train", "ab"), ("test", "c"))}  # fmt: skip
    write_dataset(datasets / "people" / "1.0.0", {"photo": IMAGE, "text": TEXT}, rows)
    return "tfds:people"


def check(place: Path | str) -> None:
    """a and b are to train on, c is held out; captions and colours are right, and contents and shapes are found."""
    found = {role: list_photographs(place, role) for role in ("train", "heldout")}
    assert [p.caption for p in found["train"]] == [CAPTIONS["a"], CAPTIONS["b"]]
    assert [p.caption for p in found["heldout"]] == [CAPTIONS["c"]]
    for photographs, names in ((found["train"], "ab"), (found["heldout"], "c")):
        readable, images = load_images(photographs, (8, 12))
        assert len(readable) == len(names)
        expected = np.array([colour(name) for name in names], np.float32)[:, None, None] / 127.5 - 1.0
        assert np.array_equal(images, np.broadcast_to(expected, images.shape))
    index = Index()
    assert {index.shape(p.picture, image_shape) for p in found["train"]} == {(8, 12)}
    assert len({index.hash(p.picture) for p in found["train"]}) == 2
    assert [p.id for p in list_photographs(place, "train")] == [p.id for p in found["train"]]


@pytest.mark.parametrize("write", [sidecars, imagefolder_jsonl, imagefolder_csv, kohya, tar, parquet])
def test_each_form_is_read(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    check(write(tmp_path / "photographs"))


def test_a_dataset_of_tfds_is_read(dataset: str) -> None:
    check(dataset)


def test_a_dataset_that_is_not_there_says_how_to_prepare_it(dataset: str) -> None:
    with pytest.raises(
        UserError, match=r"tfds:nobody: is not there \(.*file_format='array_record'\)\.download"
    ) as error:
        list_photographs("tfds:nobody", "train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("features", "row", "captions"),
    [
        ({"text": tfds.features.Sequence(TEXT)}, {"text": ["one", "ö", ""]}, ["one", "ö", ""]),
        ({"captions": tfds.features.Sequence({"id": np.int64, "text": TEXT})},
         {"captions": [{"id": 1, "text": "one"}, {"id": 2, "text": "two"}]}, ["one", "two"]),
        ({"about": {"prompt": TEXT}}, {"about": {"prompt": "one"}}, ["one"]),
        ({"mask": IMAGE, "caption": TEXT, "title": TEXT}, {"mask": "b", "caption": "one", "title": "x"}, ["one"]),
    ],
)  # fmt: skip
def test_captions_of_a_dataset_in_a_sequence_are_read(
    datasets: Path, features: dict[str, Any], row: dict[str, Any], captions: list[str]
) -> None:
    a, b = ({"image": datasets.parent / f"{name}.png"} for name in "ab")
    row = row | ({"mask": b["image"]} if "mask" in row else {})
    write_dataset(datasets / "people" / "1.0.0", {"image": IMAGE} | features, {"train": [a | row]})
    found = list_photographs("tfds:people", "train", heldout=0.0)
    assert [p.caption for p in found] == captions
    assert np.array_equal(load_images(found[:1], (1, 1))[1].ravel(), np.float32(colour("a")) / 127.5 - 1.0)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"photo": IMAGE, "mask": IMAGE, "text": TEXT}, "where there are several images one called image"),
        ({"image": tfds.features.Sequence(IMAGE), "text": TEXT}, "expects an image and a text"),
        ({"image": IMAGE, "label": np.int64}, "expects an image and a text"),
    ],
)
def test_a_dataset_of_other_features_is_named(datasets: Path, features: dict[str, Any], message: str) -> None:
    write_dataset(datasets / "people" / "1.0.0", features, {"train": []})
    with pytest.raises(UserError, match=f"tfds:people: has features .*{message}"):
        list_photographs("tfds:people", "train")


def test_a_dataset_that_is_cut_off_says_how_to_prepare_it(dataset: str, datasets: Path) -> None:
    path = datasets / "people" / "1.0.0" / "people-train.array_record-00000-of-00001"
    content = path.read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message) as error:
            list_photographs(dataset, "train", "heldout")
        assert "\n" not in str(error.value) and "prepare it with: python -c" in str(error.value)

    for length in (0, 100, 65536, len(content) - 65536, len(content) - 100, len(content) - 1):
        path.write_bytes(content[:length])
        refused(rf"tfds:people: split train cannot be read \(.*\); remove {datasets}/people/1\.0\.0 and prepare it")
    path.unlink()
    refused("split train cannot be read")
    for name in ("dataset_info.json", "features.json"):
        (datasets / "people" / "1.0.0" / name).write_text("{")
        refused(rf"tfds:people: (what {datasets}/people holds|split train) cannot be read \(")


def test_a_dataset_whose_text_is_not_utf8_is_named(datasets: Path) -> None:
    rows = [{"image": datasets.parent / "a.png", "text": b"caf\xe9"}]
    write_dataset(datasets / "people" / "1.0.0", {"image": IMAGE, "text": TEXT}, {"train": rows})
    with pytest.raises(UserError, match="split train cannot be read .*utf-8"):
        list_photographs("tfds:people", "train")


def test_a_picture_that_a_dataset_lost_since_is_named_and_left_out(
    dataset: str, datasets: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = list_photographs(dataset, "train")
    path = datasets / "people" / "1.0.0" / "people-train.array_record-00000-of-00001"
    path.write_bytes(path.read_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        assert load_images(found, (8, 12))[0] == []
        assert [e.content for e in shards.photographs_of_shard(found, Index())] == [None, None]
    assert caplog.text.count("cannot be read (") == 2


def many(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (4, 4), (i % 256, i // 256, 0)).save(folder / f"{i:04d}.png")
        (folder / f"{i:04d}.txt").write_text(f"person {i}")
    return folder


def test_where_nothing_is_marked_a_share_is_held_out_by_content(tmp_path: Path) -> None:
    folder = many(tmp_path / "p", 600)
    first = {p.caption for p in list_photographs(folder, "heldout")}
    assert 8 <= len(first) <= 30
    assert len(list_photographs(folder, "train")) == 600 - len(first)
    for path in sorted(folder.iterdir()):  # other names and another order
        path.rename(path.with_name(f"{599 - int(path.stem):04d}x{path.suffix}"))
    assert {p.caption for p in list_photographs(folder, "heldout")} == first
    assert len(list_photographs(folder, "heldout", heldout=0.5)) == pytest.approx(300, abs=60)
    with pytest.raises(UserError, match="none of the 600 is of split heldout"):
        list_photographs(folder, "heldout", heldout=0.0)
    few = many(tmp_path / "few", 12)
    assert len(list_photographs(few, "heldout")) == 6
    assert len(list_photographs(many(tmp_path / "some", 40), "heldout")) == 8


def test_images_without_text_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = many(tmp_path / "p", 20)
    (folder / "0003.txt").unlink()
    (folder / "0004.txt").write_text(" \n")
    with caplog.at_level(logging.WARNING):
        assert len(list_photographs(folder, "train", "heldout")) == 18
    assert "2 images without text beside them are left out, the first is" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.jsonl", b'{"file_name": "a.png"}', "line 1: expects file_name and one of caption, text, prompt"),
        ("metadata.jsonl", b'{"file_name"', "line 1: is not JSON"),
        ("metadata.csv", b"file,caption\na.png,x", "line 2: expects file_name"),
        ("metadata.csv", b'file_name,text\na.png,"x\nb.png,y\nc.png,z', "line 2: is no row of a CSV file .*one line"),
        ("metadata.csv", b"file_name,text\n\na.png,a woman, smiling", "line 3: has 3 values for the columns file_name"),
        ("metadata.jsonl", b'{"file_name": "/x/a.png", "text": "a"}', "line 1: file_name /x/a.png lies outside of"),
        ("metadata.jsonl", b'{"file_name": "../a.png", "text": "a"}', "line 1: file_name ../a.png lies outside of"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": null}', "line 1: expects file_name and one of"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": [null, 3]}', "line 1: expects file_name and one of"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": NaN}', "line 1: expects file_name and one of"),
        ("metadata.jsonl", b'{"file_name": "", "text": "a"}', "line 1: expects file_name and one of"),
        ("metadata.jsonl", b"1" * 5000, "line 1: is not JSON"),
        ("metadata.csv", b"file_name,text\na.png,", "line 2: expects file_name and one of"),
        ("meta.json", b'{"a.png": {"caption": null}}', "a.png has neither caption nor tags"),
        ("meta.json", b'{"a.png": {"caption": "", "tags": ["x", "y"]}}', "a.png has neither caption nor tags"),
        ("meta.json", b"1" * 5000, "is not JSON"),
        ("meta.json", b"[]", "expects {"),
        ("meta.json", b'{"a.png": {"size": 3}}', "a.png has neither caption nor tags"),
        ("meta.json", b"{", "is not JSON"),
        ("a.tar", b"no tar" * 200, "is not a tar file that can be read"),
        ("a.parquet", b"PAR1 no", "is not a parquet file that can be read"),
    ],
)
def test_a_broken_list_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    place = tmp_path / name if name.endswith(".json") else tmp_path
    with pytest.raises(UserError, match=message) as error:
        list_photographs(place, "train")
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_parquet_with_other_columns_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": ["x"], "caption": ["y"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="has columns url, caption; expects one of images"):
        list_photographs(tmp_path, "train")


def table(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize(
    "others",
    [
        {"mask": [b"x", b"x"]},
        {"a_thumbnail": [{"bytes": b"x", "path": ""}] * 2, "hash": [b"x"] * 2},
        {"audio": pa.array([b"x"] * 2, pa.large_binary()), "phash": pa.array([b"y"] * 2, pa.binary_view())},
    ],
)
def test_of_several_columns_of_bytes_image_is_the_photograph(tmp_path: Path, others: dict[str, Any]) -> None:
    for kind in (pa.binary(), pa.large_binary()):
        images = pa.array([png("a"), png("b")], kind)
        place = table(tmp_path / "a.parquet", **others, image=images, text=["one", "two"])
        readable, pixels = load_images(list_photographs(place, "train", heldout=0.0), (1, 1))
        assert [p.caption for p in readable] == ["one", "two"]
        assert np.array_equal(pixels[0].ravel(), np.float32(colour("a")) / 127.5 - 1.0)
        place = table(tmp_path / "a.parquet", **others, jpg=images, text=["one", "two"])
        with pytest.raises(UserError, match=r"has columns .*jpg, text; which holds the photographs\? Call it image"):
            list_photographs(place, "train")


def test_captions_of_parquet_may_be_lists_and_missing_ones_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = [png("a")] * 4
    place = table(tmp_path / "a.parquet", jpg=images, caption=[["one", "two"], None, [], ["three", None]])
    with caplog.at_level(logging.WARNING):
        found = list_photographs(place, "train", heldout=0.0)
    assert [(p.id, p.caption) for p in found] == [
        ("a.parquet/0/0", "one"), ("a.parquet/0/0#2", "two"), ("a.parquet/0/3", "three")]  # fmt: skip
    assert "a.parquet: 2 images without a caption are left out, the first is a.parquet/0/1" in caplog.text
    for column in ([None] * 4, [1, 2, 3, 4], [{"en": "x"}] * 4):
        with pytest.raises(UserError, match=r"a\.parquet: holds no photograph with a caption"):
            list_photographs(table(tmp_path / "a.parquet", jpg=images, caption=column), "train")
    words = pa.array(["one", "two", "one", None]).dictionary_encode()
    found = list_photographs(table(tmp_path / "a.parquet", jpg=images, caption=words), "train", heldout=0.0)
    assert [p.caption for p in found] == ["one", "two", "one"]
    wrong = pa.array([b"caf\xe9"] * 4).cast(pa.string(), safe=False)
    with pytest.raises(UserError, match=r"a\.parquet: a text in it is not UTF-8 .*; write it as UTF-8"):
        list_photographs(table(tmp_path / "a.parquet", jpg=images, caption=wrong), "train")


def test_lists_of_captions_are_examples_of_their_own(tmp_path: Path) -> None:
    write_images(tmp_path, "a")
    captions = ["one", "two"]
    for name, content in (("captions.jsonl", {"file": "a.png", "caption": captions}),
                          ("metadata.jsonl", {"file_name": "a.png", "prompt": captions}),
                          ("meta.json", {"a.png": {"caption": captions, "tags": "x"}})):  # fmt: skip
        (tmp_path / name).write_text(json.dumps(content))
        found = list_photographs(tmp_path / name if name == "meta.json" else tmp_path, "train", heldout=0.0)
        assert [(p.id, p.caption) for p in found] == [("a.png", "one"), ("a.png#2", "two")]
        (tmp_path / name).unlink()


def test_a_photograph_that_two_lists_name_is_refused(tmp_path: Path) -> None:
    """Everything would be there twice."""
    lists = {"": imagefolder_jsonl(tmp_path / "p"), "train": tmp_path / "q"}
    (lists[""] / "metadata.csv").write_text("file_name,text\nb.png,x\n")
    with pytest.raises(UserError, match=r"metadata\.jsonl line 2: .*metadata\.csv lists b\.png too; keep one"):
        list_photographs(lists[""], "train")
    imagefolder_csv(lists["train"])
    (lists["train"] / "metadata.jsonl").write_text('{"file_name": "validation/../train/a.png", "text": "x"}')
    with pytest.raises(UserError, match=r"train/metadata\.csv line 2: \S+/q/metadata\.jsonl lists train/a\.png too"):
        list_photographs(lists["train"], "train")
    (lists["train"] / "metadata.jsonl").unlink()
    write_images(lists["train"] / "validation", "b")
    (lists["train"] / "validation" / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "x"}')
    assert len(list_photographs(lists["train"], "heldout")) == 2  # of other photographs
    for folder in (".cache", "__MACOSX"):
        (lists["train"] / folder).mkdir()
        (lists["train"] / folder / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "x"}')
    assert len(list_photographs(lists["train"], "heldout")) == 2


@pytest.mark.parametrize("write", [sidecars, imagefolder_jsonl, imagefolder_csv, kohya, tar, parquet])
def test_a_folder_may_be_called_with_marks_of_patterns(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    check(write(tmp_path / "2024 [best] *?{a}"))


@pytest.mark.parametrize("name", ["a[1]", "[ab]c", "x*", "y?", "v1.0", "a b.c"])
def test_kohyas_names_without_suffix_are_taken_as_they_are(tmp_path: Path, name: str) -> None:
    for file in (name, f"{name}.seg", "b", "xy", "yz", "a1"):
        (tmp_path / f"{file}.png").write_bytes(png("a"))
    (tmp_path / f"._{name}.png").write_bytes(b"x")
    (tmp_path / "meta.json").write_text(json.dumps({name: {"tags": "one"}, "gone": {"tags": "two"}}))
    found = list_photographs(tmp_path / "meta.json", "train", heldout=0.0)
    assert [p.picture for p in found] == [tmp_path / f"{name}.png", tmp_path / "gone"]
    (tmp_path / f"{name}.JPG").write_bytes(b"x")
    with pytest.raises(UserError, match="may be .*; write its suffix"):
        list_photographs(tmp_path / "meta.json", "train")


def test_what_systems_leave_beside_shards_is_passed_over(tmp_path: Path) -> None:
    place = parquet(tmp_path / "p")
    for name in ("._a.parquet", "data/._train-00000.parquet", "._b.tar"):
        (place / name).write_bytes(b"\0\5\26\7")
    check(place)


def test_damaged_files_are_read_named_or_refused_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    cases = damaged_photographs.cases()
    mutations.sound(cases)
    places = mutations.places(cases)
    found = mutations.run(cases, range(15 * len(places)))
    assert all(found[*place, "read"] < 15 for place in places)
