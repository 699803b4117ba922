"""The files below a folder."""

import os
from pathlib import Path

from hgdpo_jax.data.readers.beside import is_passed_over
from hgdpo_jax.run.errors import UserError


def files_below(folder: Path) -> tuple[list[str], list[str]]:
    """The files below a folder, and the links that lead nowhere: paths from the folder, with `/`, in their order.

    Linked folders are entered, each folder once. What :func:`is_passed_over` names is passed over.

    Raises:
        UserError: a folder cannot be read.
    """
    files: list[str] = []
    broken: list[str] = []
    real, seen = [""], set()
    linked: list[str] = []
    while real or linked:
        place = real.pop() if real else linked.pop(0)  # a folder keeps its own name where a link leads to it too
        where = os.path.realpath(folder / place)
        if where in seen:
            continue
        seen.add(where)
        try:
            entries = sorted(os.scandir(folder / place), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"{folder / place}: cannot be read ({error.strerror})") from error
        for entry in entries:
            name = f"{place}{entry.name}"
            if is_passed_over(entry.name):
                continue
            if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                (linked if entry.is_symlink() else real).append(f"{name}/")
            elif os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file():
                files.append(name)
            elif entry.is_symlink():
                broken.append(name)
    return sorted(files, key=_parts), sorted(broken, key=_parts)


def _parts(name: str) -> list[str]:
    return name.split("/")
