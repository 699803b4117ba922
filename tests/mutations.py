"""Damaged files of every kind that people bring: python -m tests.mutations [COUNT]

Bytes of sound files are flipped, cut out and repeated, always alike for the same number. What reads them must read
them, name them in a warning, or refuse them in one line; anything else ends the script with the exception.
"""

import collections
import io
import json
import logging
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from safetensors.numpy import save
from tqdm import tqdm

from hgdpo_jax.data.photographs import list_photographs
from hgdpo_jax.data.pixels import load_images, load_losers
from hgdpo_jax.models.weights import Weights
from hgdpo_jax.pictures.read import image_shape
from hgdpo_jax.run.errors import UserError

SIZE = (8, 12)


def picture(kind: str) -> bytes:
    """A picture that compresses to some hundred bytes."""
    rng, buffer = np.random.default_rng(0), io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (9, 13, 3), np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def _tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in (("a.png", picture("png")), ("a.txt", b"a woman"), ("b.json", b'{"caption": "a man"}'),
                              ("b.jpg", picture("jpeg"))):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def _parquet() -> bytes:
    buffer = io.BytesIO()
    pictures = [picture("png"), picture("jpeg")]
    pq.write_table(pa.table({"image": pictures, "caption": ["a woman", "a man"]}), buffer)
    return buffer.getvalue()


def _lines(*entries: dict) -> bytes:
    return "\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries).encode()


# Name of the file → its sound content.
SOUND: dict[str, bytes] = {
    "a.png": picture("png"),
    "a.jpg": picture("jpeg"),
    "a.safetensors": save({"a.weight": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float16)}, {"format": "pt"}),
    "captions.jsonl": _lines({"file": "a.png", "caption": "a woman, ö"}, {"file": "a.png", "caption": "a man"}),
    "pairs.jsonl": _lines({"caption": "a woman", "winner": "a.png", "loser": "a.png"}),
    "meta.json": json.dumps({"a.png": {"caption": "a woman", "tags": "x"}, "b.png": {"tags": "y"}}).encode(),
    "a.tar": _tar(),
    "a.parquet": _parquet(),
}


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """One to four of: a byte changed, a piece cut out, a piece repeated, the end cut off."""
    found = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        at = int(rng.integers(len(found))) if found else 0
        length = int(rng.integers(1, 17))
        match rng.integers(4):
            case 0 if found:
                found[at] = rng.integers(256)
            case 1:
                del found[at : at + length]
            case 2:
                found[at:at] = found[at : at + length]
            case 3 if rng.random() < 0.3:
                del found[at:]
    return bytes(found)


def read(folder: Path, name: str) -> str:
    """Reads a file as a command would; how that ended.

    Raises:
        AssertionError: what was read has not the shape that it should have.
    """
    path = folder / name
    try:
        if name == "a.safetensors":
            weights = Weights(path)
            for key in weights:
                assert weights[key].shape == weights.shape(key)
            return "read"
        if name == "pairs.jsonl":
            photographs = list_photographs(path, "train", heldout=0.0, given=True)
            readable, images, losers = load_losers(*load_images(photographs, SIZE))
            assert losers.shape == images.shape
        else:
            if name in ("a.png", "a.jpg"):
                listed = [{"file": name, "caption": "x"}]
                (folder / "captions.jsonl").write_text(json.dumps(listed[0]))
            photographs = list_photographs(path if name == "meta.json" else folder, "train", heldout=0.0)
            readable, images = load_images(photographs, SIZE)
        assert images.shape == (len(readable), *SIZE, 3) and images.dtype == np.float32
        assert images.size == 0 or (images.min() >= -1.0 and images.max() <= 1.0)
        assert all(len(image_shape(photograph.picture)) == 2 for photograph in readable)
        return "read" if len(readable) == len(photographs) else "named and left out"
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000, repr(str(error))
        return "refused"


def run(count: int, each: Callable[[int], None] = lambda number: None) -> collections.Counter[tuple[str, str]]:
    """(file, how reading ended) → how often, of the first `count` damaged files."""
    found: collections.Counter[tuple[str, str]] = collections.Counter()
    for number in range(count):
        rng, name = np.random.default_rng(number), list(SOUND)[number % len(SOUND)]
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "a.png").write_bytes(SOUND["a.png"])
            (Path(folder) / name).write_bytes(mutated(SOUND[name], rng))
            if name in ("a.tar", "a.parquet", "a.safetensors"):
                (Path(folder) / "a.png").unlink()
            try:
                found[name, read(Path(folder), name)] += 1
            except Exception as error:
                error.add_note(f"number {number}, {name}")
                raise
        each(number)
    return found


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    total = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    with tqdm(total=total, unit="file") as bar:
        for (name, how), times in sorted(run(total, lambda number: bar.update()).items()):
            tqdm.write(f"{name:16} {how:20} {times}")
