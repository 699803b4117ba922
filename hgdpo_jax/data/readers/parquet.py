"""Parquet with the images' bytes, as Hugging Face's datasets are stored: a column of images and one of captions."""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hgdpo_jax.data.readers import beside
from hgdpo_jax.data.readers.example import (
    CAPTIONS,
    IMAGE,
    SPLITS,
    Example,
    Examples,
    as_captions,
    image_among,
    split_of_file,
)
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import Member


def read(files: Sequence[Path]) -> Examples:
    """A field `split` counts before the file's name; a list of captions is an example for each. Rows without a caption
    are counted in a warning.

    Raises:
        UserError: a file that is broken or of other columns.
    """
    for path in files:
        image = caption = ""

        def wanted(schema: pa.Schema, path: Path = path) -> list[str]:
            nonlocal image, caption
            image, caption = _columns(schema, path)
            return [name for name in (caption, "split") if name in schema.names]

        without = []
        for group, row, entry in read_rows(path, wanted):
            name, captions = f"{path.name}/{group}/{row}", as_captions(entry[caption])
            split = SPLITS.get(str(entry.get("split", "")).lower()) or split_of_file(path)
            for text in captions:
                yield Example(name, picture(path, image, group, row), text, split)
            if not captions:
                without.append(name)
        beside.say(path, "without a caption", without)


def read_rows(path: Path, wanted: Callable[[pa.Schema], Sequence[str]]) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(row group, row in it, its values in the columns that `wanted` chooses) of a file.

    Raises:
        UserError: it is broken.
    """
    try:
        table = pq.ParquetFile(path)
        columns = list(wanted(table.schema_arrow))
        for group in range(table.num_row_groups):
            for row, entry in enumerate(table.read_row_group(group, columns=columns).to_pylist()):
                yield group, row, entry
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: a text in it is not UTF-8 ({error.reason}); write it as UTF-8") from error
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: is not a parquet file that can be read ({reason}); copy it again") from error


def _columns(schema: pa.Schema, path: Path) -> tuple[str, str]:
    """The names of the columns of images and of captions."""
    images = [field.name for field in schema if _is_bytes(field.type) or _is_image(field.type)]
    captions = [name for name in CAPTIONS if name in schema.names and name not in images]
    has = f"{path}: has columns {', '.join(schema.names)}"
    if not images or not captions:
        raise UserError(f"{has}; expects one of images, as bytes or as a struct with bytes, and one of "
                        f"{', '.join(CAPTIONS)}")  # fmt: skip
    image = image_among(images)
    if image is None:
        raise UserError(f"{has}; which holds the photographs? Call it {IMAGE}")
    return image, captions[0]


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _is_image(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0


def picture(path: Path, column: str, group: int, row: int) -> Member:
    """The bytes of a row, or of the field `bytes` in it; they are read when they are asked for."""

    def content() -> bytes:
        try:
            with _one_reads:
                found: Any = _group(path, column, group)[row].as_py()
        except pa.ArrowException as error:
            raise OSError(str(error)) from error
        found = found["bytes"] if isinstance(found, dict) else found
        if not found:
            raise OSError("has no bytes")
        return found

    return Member(path, f"{column} of row {row} of group {group}", content)


_one_reads = Lock()  # several threads would each read the group


@lru_cache(2)  # pictures are read one after the other
def _group(path: Path, column: str, group: int) -> pa.ChunkedArray:
    return pq.ParquetFile(path).read_row_group(group, columns=[column]).column(0)
