"""CSV files with a header, a row on each line; and files that are one value of JSON."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import read_lines


def columns(path: Path) -> list[str]:
    """What the first line names. Raises UserError as :func:`rows` does."""
    lines = read_lines(path)
    return _values(path, *lines[0]) if lines else []


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows with the numbers of their lines, by the names of the columns.

    Raises:
        UserError: no such file, not UTF-8, a quotation mark that is not closed on its line, which would swallow the
            rows that follow, or another number of values than columns.
    """
    names = columns(path)
    for number, line in read_lines(path)[1:]:
        values = _values(path, number, line)
        if len(values) != len(names):
            raise UserError(f"{path} line {number}: has {len(values)} values for the columns {', '.join(names)}; put "
                            "quotation marks around a caption with commas")  # fmt: skip
        yield number, dict(zip(names, values, strict=True))


def _values(path: Path, number: int, line: str) -> list[str]:
    try:
        (found,) = csv.reader([line], strict=True)
    except csv.Error as error:
        raise UserError(f"{path} line {number}: is no row of a CSV file ({error}); a row is one line") from error
    return found


def read_json(path: Path) -> Any:
    """What a file says. Raises UserError where it cannot be read, or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({error})") from error
