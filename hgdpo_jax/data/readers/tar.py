"""WebDataset's tar shards: NAME.jpg, NAME.txt or NAME.json, … one after the other, an example for each NAME."""

import json
import logging
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hgdpo_jax.data.readers.example import Example, Examples, caption_of, split_of_file
from hgdpo_jax.pictures.read import SUFFIXES
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import Member


def read(shards: Sequence[Path]) -> Examples:
    """Members are read where they lie: a shard is neither unpacked nor kept open.

    Raises:
        UserError: a shard is broken.
    """
    for shard in shards:
        pictures: dict[str, Member] = {}
        captions: dict[str, str] = {}
        try:
            with tarfile.open(shard, "r:") as archive:
                for member in archive:
                    folder, _, file = member.name.rpartition("/")
                    stem, _, kind = file.partition(".")
                    name, suffix = f"{folder}/{stem}" if folder else stem, f".{kind.rpartition('.')[2].lower()}"
                    if not member.isfile():
                        continue
                    if suffix in SUFFIXES:
                        pictures[name] = _member(shard, member)
                    elif suffix in (".txt", ".json"):
                        caption = _caption(_member(shard, member).read(), suffix)
                        if caption is not None and (suffix == ".txt" or name not in captions):
                            captions[name] = caption
        except (tarfile.TarError, OSError, EOFError, ValueError, RecursionError) as error:
            raise UserError(f"{shard}: is not a tar file that can be read ({error}); copy it again") from error
        without = [name for name in pictures if name not in captions]
        if without:
            logging.warning("%s: %d images without text are left out, the first is %s", shard, len(without), without[0])
        for name, picture in pictures.items():
            if name in captions:
                yield Example(f"{shard.name}/{name}", picture, captions[name], split_of_file(shard))


def _member(shard: Path, member: tarfile.TarInfo) -> Member:
    begin, size = member.offset_data, member.size

    def content() -> bytes:
        with shard.open("rb") as file:
            file.seek(begin)
            return file.read(size)

    return Member(shard, member.name, content)


def _caption(content: bytes, suffix: str) -> str | None:
    text = content.decode("utf-8-sig").strip()
    if suffix == ".txt":
        return text or None
    entry: Any = json.loads(text)
    return caption_of(entry) if isinstance(entry, dict) else None
