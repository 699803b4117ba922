"""Pictures with captions in each of the forms in which people have them."""

import io
import json
import tarfile
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow_datasets as tfds
from PIL import Image, ImageCms

from hgdpo_jax.data.photographs import list_photographs
from hgdpo_jax.data.pixels import load_images, load_losers
from hgdpo_jax.pictures.read import image_shape
from tests.data.datasets import write_dataset
from tests.mutations.case import Case, written

SIZE = (8, 12)


def picture(kind: str) -> bytes:
    """A picture that compresses to some hundred bytes."""
    rng, buffer = np.random.default_rng(0), io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (9, 13, 3), np.uint8)).save(buffer, kind)
    return buffer.getvalue()


PNG, JPEG = picture("png"), picture("jpeg")


def _pictures() -> dict[str, bytes]:
    """Pictures of other kinds: among them one that is turned, one with a colour profile and one of 16 bits."""
    found = {f"a.{kind}": picture(kind) for kind in ("webp", "avif", "tiff", "gif")}
    turned = Image.Exif()
    turned[0x0112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name, image, more in (("turned.jpeg", Image.new("CMYK", (13, 9)), {"exif": turned}),
                              ("profile.jpeg", Image.new("RGB", (13, 9), "red"), {"icc_profile": profile}),
                              ("grey.png", Image.new("I;16", (13, 9), 7), {})):  # fmt: skip
        buffer = io.BytesIO()
        image.save(buffer, name.partition(".")[2], **more)
        found[name] = buffer.getvalue()
    return found


def _tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in (("a.png", PNG), ("a.txt", b"a woman"), ("b.json", b'{"caption": "a man"}'),
                              ("b.jpg", JPEG)):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def _parquet(**columns: list) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def _lines(*entries: dict) -> bytes:
    return "\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries).encode()


def _read(folder: Path, place: str = "", given: bool = False) -> bool:
    """Reads photographs, or pairs that are `given`, with their pixels; whether all could be read."""
    photographs = list_photographs(folder / place, "train", heldout=0.0, given=given)
    readable, images = load_images(photographs, SIZE)
    if given:
        readable, images, losers = load_losers(readable, images)
        assert losers.shape == images.shape
    assert images.shape == (len(readable), *SIZE, 3) and images.dtype == np.float32
    assert images.size == 0 or (images.min() >= -1.0 and images.max() <= 1.0)
    assert all(len(image_shape(photograph.picture)) == 2 for photograph in readable)
    return len(readable) == len(photographs)


def _read_dataset(folder: Path) -> bool:
    with mock.patch.object(tfds.core.constants, "DATA_DIR", str(folder)):
        return _read(Path("tfds:people"))


def _dataset(folder: Path) -> None:
    image, text = tfds.features.Image(shape=(None, None, 3)), tfds.features.Text()
    features = {"image": image, "captions": tfds.features.Sequence({"text": text, "id": np.int64}), "number": np.int64}
    pictures = [(PNG, ["a woman", "a man, ö"]), (JPEG, ["a child"])]
    rows = [{"image": io.BytesIO(content), "captions": [{"text": text, "id": 1} for text in texts], "number": 2}
            for content, texts in pictures]  # fmt: skip
    write_dataset(folder / "people" / "1.0.0", features, {"train": rows, "test": rows[:1]})


_LISTED = _lines({"file": "a.png", "caption": "a woman, ö"}, {"file": "a.png", "caption": "a man"})
_GIVEN = _lines({"caption": "a woman", "winner": "a.png", "loser": "a.png"})
_KOHYA = json.dumps({"a.png": {"caption": "a woman", "tags": "x"}, "b.png": {"tags": "y"}}).encode()
_METADATA = _lines({"file_name": "a.png", "text": "a woman"}, {"file_name": "b/a.png", "text": ["a man", "ö"]})
_TABLE = b'file_name,text\na.png,a woman\nb/a.png,"a man, ""old"""\n'
_HPD = json.dumps([{"prompt": "a woman", "path1": "a.png", "path2": "b/a.png"}] * 2).encode()
_REAL_ALIGN = b'prompt,real_image_path,fake_image_path\n"a man, old",a.png,b/a.png\n'
_OF_HUB = {"image": [{"bytes": content, "path": "a"} for content in (PNG, JPEG)], "text": [["x", "y"], ["z"]],
           "split": ["train", None]}  # fmt: skip
_BOTH = {"jpg_0": [PNG, JPEG], "jpg_1": [JPEG, PNG], "caption": ["x", "y"], "label_0": [1.0, 0.0]}


def cases() -> dict[str, Case]:
    """All of them by name."""
    png, dataset = {"a.png": PNG}, written(_dataset)
    pictures = {name: Case({name: content, f"{Path(name).stem}.caption": b"a woman"}, [name], _read)
                for name, content in _pictures().items()}  # fmt: skip
    return pictures | {
        "a.png": Case(png | {"captions.jsonl": _lines({"file": "a.png", "caption": "x"})}, ["a.png"], _read),
        "a.jpg": Case({"a.jpg": JPEG, "a.txt": b"a woman, \xc3\xb6"}, ["a.jpg", "a.txt"], _read),
        "captions.jsonl": Case(png | {"captions.jsonl": _LISTED}, ["captions.jsonl"], _read),
        "kohya": Case(png | {"b.png": PNG, "meta.json": _KOHYA}, ["meta.json"], partial(_read, place="meta.json")),
        "imagefolder": Case(png | {"b/a.png": PNG, "metadata.jsonl": _METADATA}, ["metadata.jsonl"], _read),
        "table": Case(png | {"b/a.png": PNG, "metadata.csv": _TABLE}, ["metadata.csv"], _read),
        "tar": Case({"a.tar": _tar()}, ["a.tar"], _read),
        "parquet": Case({"a.parquet": _parquet(image=[PNG, JPEG], caption=["x", "y"])}, ["a.parquet"], _read),
        "parquet of the hub": Case({"data/train-00000.parquet": _parquet(**_OF_HUB)}, ["data/train-00000.parquet"],
                                   _read),
        "TFDS": Case(dataset, [name for name in dataset if "-test." not in name], _read_dataset,
                     named="tfds:people"),
        "pairs.jsonl": Case(png | {"pairs.jsonl": _GIVEN}, ["pairs.jsonl"],
                            partial(_read, place="pairs.jsonl", given=True)),
        "HPDv3": Case(png | {"b/a.png": PNG, "a.json": _HPD}, ["a.json"], partial(_read, place="a.json", given=True)),
        "RealAlign": Case(png | {"b/a.png": PNG, "a.csv": _REAL_ALIGN}, ["a.csv"],
                          partial(_read, place="a.csv", given=True)),
        "real and fake": Case({"real/a.png": PNG, "fake/a.jpg": JPEG, "a.csv": b"uid,prompt\na,a woman\n"}, ["a.csv"],
                              partial(_read, given=True)),
        "w and l": Case({"w/a.png": PNG, "w/a.txt": b"a woman", "l/a.png": PNG}, ["l/a.png", "w/a.txt"],
                        partial(_read, given=True)),
        "pairs.parquet": Case({"a.parquet": _parquet(**_BOTH)}, ["a.parquet"], partial(_read, given=True)),
    }  # fmt: skip
