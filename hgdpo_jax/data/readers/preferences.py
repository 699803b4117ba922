"""Preference pairs as people have them: two pictures of one caption, of which one was preferred.

Each reader takes a place and gives examples with a loser.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from hgdpo_jax.data.readers import parquet, table
from hgdpo_jax.data.readers.example import Example, Examples, split_of_file
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import read_lines

_SPLITS = ("train", "heldout")
_PICK_A_PIC = ("jpg_0", "jpg_1", "label_0", "caption")
_REAL_ALIGN = ("prompt", "real_image_path", "fake_image_path")
_HPD = ("prompt", "path1", "path2")


def reader(place: str | Path) -> Callable[[], Examples]:
    """What reads a place, which its name and its columns tell.

    Raises:
        UserError: nothing does.
    """
    path = Path(place)
    if not str(place) or not path.exists():
        raise UserError(f"pairs {place}: no such file or folder; set --config.data.pairs")
    shards = sorted(path.glob("**/*.parquet")) if path.is_dir() else [path] if path.suffix == ".parquet" else []
    if shards:
        return lambda: pick_a_pic(shards)
    readers = {".jsonl": listed, ".json": hpd, ".csv": real_align}
    if path.is_file() and path.suffix in readers:
        return lambda: readers[path.suffix](path)
    raise UserError(f"pairs {place}: expects .jsonl, Pick-a-Pic's .parquet, HPDv3's .json or RealAlign's .csv")


def listed(path: Path) -> Examples:
    """{"caption": "…", "winner": "a.png", "loser": "b.png", "split": "train"} a line, paths from the file's folder."""
    for number, line in read_lines(path):
        try:
            entry = json.loads(line)
            caption, winner, loser, split = *(entry[key] for key in ("caption", "winner", "loser")), entry.get("split")
            if not all(isinstance(value, str) for value in (caption, winner, loser)):
                raise TypeError
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f'{path} line {number}: expects {{"caption": …, "winner": …, "loser": …}}') from error
        if split is not None and split not in _SPLITS:
            raise UserError(f"{path} line {number}: split {split!r} is not one of {', '.join(_SPLITS)}")
        yield Example(winner, path.parent / winner, caption, split, path.parent / loser)


def hpd(path: Path) -> Examples:
    """HPDv3: a list of {"prompt", "path1", "path2"}; the first was preferred."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({error})") from error
    if not isinstance(entries, list):
        raise UserError(f"{path}: expects a list of {{{', '.join(_HPD)}}}")
    for number, entry in enumerate(entries, start=1):
        values = [entry.get(key) if isinstance(entry, dict) else None for key in _HPD]
        texts = [value for value in values if isinstance(value, str)]
        if len(texts) < len(_HPD):
            raise UserError(f"{path}: entry {number} has not {', '.join(_HPD)}")
        prompt, winner, loser = texts
        yield Example(winner, path.parent / winner, prompt, None, path.parent / loser)


def real_align(path: Path) -> Examples:
    """RealAlign's CSV: prompt, real_image_path, fake_image_path; the photograph is preferred."""
    found = table.columns(path)
    if not set(_REAL_ALIGN) <= set(found):
        raise UserError(f"{path}: has columns {', '.join(found)}; expects {', '.join(_REAL_ALIGN)}")
    for number, row in table.read_rows(path):
        prompt, real, fake = (row[key] for key in _REAL_ALIGN)
        if not (prompt and real and fake):
            raise UserError(f"{path} line {number}: expects {', '.join(_REAL_ALIGN)}")
        yield Example(real, path.parent / real, prompt, None, path.parent / fake)


def pick_a_pic(shards: Sequence[Path]) -> Examples:
    """Pick-a-Pic v2's parquet: jpg_0 and jpg_1, preferred is the first where label_0 is 1 and the second where it is 0.

    Ties and rows without a label are dropped, and how many are is said.
    """
    dropped: Counter[str] = Counter()
    for path in shards:

        def wanted(schema: pa.Schema, path: Path = path) -> list[str]:
            if not set(_PICK_A_PIC) <= set(schema.names):
                raise UserError(f"{path}: has columns {', '.join(schema.names)}; expects {', '.join(_PICK_A_PIC)}")
            return ["label_0", "caption", *(["has_label"] if "has_label" in schema.names else [])]

        for group, row, entry in parquet.read_rows(path, wanted):
            fault = _fault(entry)
            if fault:
                dropped[fault] += 1
                continue
            pictures = [parquet.picture(path, column, group, row) for column in ("jpg_0", "jpg_1")]
            winner, loser = pictures if entry["label_0"] == 1 else pictures[::-1]
            yield Example(f"{path.name}/{group}/{row}", winner, entry["caption"], split_of_file(path), loser)
    if dropped:
        logging.warning("pairs: %s dropped", " and ".join(f"{count} {fault}" for fault, count in dropped.items()))


def _fault(entry: Mapping[str, Any]) -> str | None:
    """Why a row is no pair."""
    if not entry.get("has_label", True) or entry["label_0"] is None or not isinstance(entry["caption"], str):
        return "without a label or caption"
    return None if entry["label_0"] in (0, 1) else "ties"
