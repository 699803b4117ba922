"""Each form in which people keep photographs is written by its own library or by hand, and read back."""

import csv
import io
import json
import logging
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from hgdpo_jax.data.photographs import list_photographs
from hgdpo_jax.data.pixels import load_images
from hgdpo_jax.pictures.read import image_shape
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.index import Index
from tests import mutations

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
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A dataset that TFDS finds by its name."""
    folder = tmp_path / "tfds" / "people" / "1.0.0"
    folder.mkdir(parents=True)
    schema = tfds.features.FeaturesDict({"photo": tfds.features.Image(shape=(8, 12, 3)), "text": tfds.features.Text()})
    serializer = tfds.core.example_serializer.ExampleSerializer(schema.get_serialized_info())
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name="people", split="train", filetype_suffix="array_record"
    )
    infos = []
    for split, names in (("train", "ab"), ("test", "c")):
        path = folder / f"people-{split}.array_record-00000-of-00001"
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for name in names:
            write_images(tmp_path, name)
            example = schema.encode_example({"photo": tmp_path / f"{name}.png", "text": CAPTIONS[name]})
            writer.write(serializer.serialize_example(example))
        writer.close()
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[len(names)],
                num_bytes=path.stat().st_size,
                filename_template=template.replace(split=split),
            )
        )
    tfds.folder_dataset.write_metadata(data_dir=str(folder), features=schema, split_infos=infos, check_data=False,
                                       filename_template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}")  # fmt: skip
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path / "tfds"))
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


def test_damaged_files_are_read_named_or_refused_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    found = mutations.run(200)
    assert sum(found.values()) == 200
    for name in mutations.SOUND:
        assert found[name, "read"] + found[name, "named and left out"] + found[name, "refused"] == 25
        assert found[name, "read"] < 25
