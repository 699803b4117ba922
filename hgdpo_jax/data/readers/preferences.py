"""Preference pairs as people have them: two pictures of one caption, of which one was preferred.

Each reader takes a place and gives examples with a loser.
"""

import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from hgdpo_jax.data.readers import pair_folders, parquet, table
from hgdpo_jax.data.readers.example import Example, Examples, Form, split_of_file
from hgdpo_jax.data.readers.folders import files_below
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import read_lines

_SPLITS = ("train", "heldout")
_PICK_A_PIC = ("jpg_0", "jpg_1", "label_0", "caption")
_REAL_ALIGN = ("prompt", "real_image_path", "fake_image_path")
_HPD = ("prompt", "path1", "path2")


def form(place: str | Path) -> Form:
    """The form of a place, which its name, its columns and the names of its files tell.

    Raises:
        UserError: nothing reads it, or one thing as well as another.
    """
    path = Path(place)
    if not str(place):
        raise UserError("config key data.pairs: is empty; set it to pairs in one of the forms of docs/your-data.md")
    if not os.path.exists(path):
        sides = pair_folders.two_folders(str(place))
        if sides is None:
            raise UserError(f"pairs {place}: no such file or folder; set --config.data.pairs")
        return Form("text files beside the winners", lambda: pair_folders.read_two(*sides))
    files = files_below(path)[0] if path.is_dir() else []
    shards = [path / name for name in files] if path.is_dir() else [path]
    shards = [shard for shard in shards if shard.suffix.lower() == ".parquet"]
    layouts = pair_folders.layouts_in(files)
    kinds = [f"{layout.winner} with {layout.loser}" for layout in layouts] + [".parquet"] * bool(shards)
    if len(kinds) > 1:
        raise UserError(f"pairs {place}: holds {' and '.join(kinds)}; which are the pairs? Give a folder of one kind")
    if shards:
        return Form("Pick-a-Pic's parquet", lambda: pick_a_pic(shards))
    if layouts:
        return Form(kinds[0], lambda: pair_folders.read(path, layouts[0]))
    readers = {".jsonl": listed, ".json": hpd, ".csv": real_align}
    suffix = path.suffix.lower()
    if path.is_file() and suffix in readers:
        return Form(path.name, lambda: readers[suffix](path))
    raise UserError(f"pairs {place}: expects .jsonl, Pick-a-Pic's .parquet, HPDv3's .json, RealAlign's .csv, a folder "
                    "with w/ and l/, chosen/ and rejected/ or real/ and fake/, or WINNERS,LOSERS")  # fmt: skip


def listed(path: Path) -> Examples:
    """{"caption": "…", "winner": "a.png", "loser": "b.png", "split": "train"} a line, paths from the file's folder."""
    for number, line in read_lines(path):
        try:
            entry = json.loads(line)
            caption, winner, loser, split = *(entry[key] for key in ("caption", "winner", "loser")), entry.get("split")
            if not all(isinstance(value, str) for value in (caption, winner, loser)):
                raise TypeError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f'{path} line {number}: expects {{"caption": …, "winner": …, "loser": …}}') from error
        if split is not None and split not in _SPLITS:
            raise UserError(f"{path} line {number}: split {split!r} is not one of {', '.join(_SPLITS)}")
        yield Example(winner, path.parent / winner, caption, split, path.parent / loser)


def hpd(path: Path) -> Examples:
    """HPDv3: a list of {"prompt", "path1", "path2"}; the first was preferred."""
    entries = table.read_json(path)
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

    Ties, which are 0.5, and rows without a label are dropped, and how many are is said.

    Raises:
        UserError: a file is broken, or has other columns or labels.
    """
    dropped: Counter[str] = Counter()
    for path in shards:

        def wanted(schema: pa.Schema, path: Path = path) -> list[str]:
            if not set(_PICK_A_PIC) <= set(schema.names):
                raise UserError(f"{path}: has columns {', '.join(schema.names)}; expects {', '.join(_PICK_A_PIC)}")
            return ["label_0", "caption", *(["has_label"] if "has_label" in schema.names else [])]

        for group, row, entry in parquet.read_rows(path, wanted):
            if fault := _fault(entry, f"{path} row {row} of group {group}"):
                dropped[fault] += 1
                continue
            pictures = [parquet.picture(path, column, group, row) for column in ("jpg_0", "jpg_1")]
            winner, loser = pictures if entry["label_0"] == 1 else pictures[::-1]
            yield Example(f"{path.name}/{group}/{row}", winner, entry["caption"], split_of_file(path), loser)
    if dropped:
        logging.warning("pairs: %s dropped", " and ".join(f"{count} {fault}" for fault, count in dropped.items()))


def _fault(entry: Mapping[str, Any], where: str) -> str | None:
    """Why a row is no pair. Raises UserError for a label that says neither."""
    label = entry["label_0"]
    if not entry.get("has_label", True) or label is None or label != label or not isinstance(entry["caption"], str):
        return "without a label or caption"
    if label not in (0, 0.5, 1):
        raise UserError(f"{where}: label_0 is {label!r}; expects 1, 0, or 0.5 for a tie")
    return "ties" if label == 0.5 else None
