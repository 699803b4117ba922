"""Images with a text file of the same name beside them, as kohya's scripts and OneTrainer keep them."""

from collections.abc import Sequence
from pathlib import Path

from hgdpo_jax.data.readers import beside
from hgdpo_jax.data.readers.example import Example, Examples, split_of_folder
from hgdpo_jax.data.readers.folders import files_below
from hgdpo_jax.pictures.read import SUFFIXES, UNOPENED
from hgdpo_jax.run.files import read_lines


def lie_in(folder: Path) -> bool:
    """Whether a folder holds text, and images beside it."""
    suffixes = set(map(beside.suffix_of, files_below(folder)[0]))
    return bool(suffixes & set(beside.TEXTS) and suffixes & {*SUFFIXES, *UNOPENED})


def read(folder: Path) -> Examples:
    """The caption is the first line that is not blank. Images that are left out are counted in warnings.

    Raises:
        UserError: a folder or a text cannot be read, or two images have one text.
    """
    files, broken = files_below(folder)
    matches, without = beside.match(folder, files)
    for picture, texts, _ in matches:
        caption = first_line(folder, texts)
        if caption:
            yield Example(picture, folder / picture, caption, split_of_folder(picture))
        else:
            without.append(picture)
    beside.say_left_out(folder, without, files)
    beside.say(
        folder, "that are links to nothing", [n for n in broken if beside.suffix_of(n) in {*SUFFIXES, *UNOPENED}]
    )


def first_line(folder: Path, texts: Sequence[str]) -> str | None:
    """The first line of some texts that is not blank; None where there is none."""
    lines = (read_lines(folder / text) for text in texts)
    return next((found[0][1] for found in lines if found), None)
