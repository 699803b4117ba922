"""Preference pairs in folders, where winner and loser have equal names, whatever their suffixes, in one of the layouts:

    w/a.png     l/a.jpg                 kohya's
    chosen/…    rejected/…              of OneTrainer's pair tool, with train/ and val/ in each
    real/…      fake/…     mask/…       RealAlign's
    winner/…    loser/…
    a.png       a-rejectedlabel.png     beside each other, as OneTrainer labels masks
    one/a.png   other/a.png             two folders of any names

The caption lies beside the winner, or in a CSV file of the folder that has columns uid (the name) and prompt, which is
what RealAlign's pairs are made from.
"""

import os
import posixpath
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from hgdpo_jax.data.readers import beside, table
from hgdpo_jax.data.readers.example import Example, Examples, split_of_folder
from hgdpo_jax.data.readers.folders import files_below
from hgdpo_jax.data.readers.sidecars import first_line
from hgdpo_jax.pictures.read import SUFFIXES, UNOPENED
from hgdpo_jax.run.errors import UserError

_FOLDERS = (("w", "l"), ("chosen", "rejected"), ("real", "fake"), ("winner", "loser"))
_REJECTED, _OTHERS = "-rejectedlabel", ("-masklabel", "-condlabel")
_UID, _PROMPT = "uid", "prompt"


class Role(NamedTuple):
    """What a file is in a layout: of a winner or of a loser, and the name that both have, with the file's suffix."""

    won: bool
    name: str


class Layout(NamedTuple):
    """How winners and losers are told apart: their names in words, and what a path is; None where it is neither."""

    winner: str
    loser: str
    role_of: Callable[[str], Role | None]


class _File(NamedTuple):
    """The path of a file below a folder, and the name that it has in its pair."""

    path: str
    name: str


def _role_by_folder(path: str, winners: str, losers: str) -> Role | None:
    *folders, file = path.split("/")
    for i, folder in enumerate(folders):
        if folder in (winners, losers):
            return Role(folder == winners, "/".join([*folders[:i], *folders[i + 1 :], file]))
    return None


def _role_by_label(path: str) -> Role | None:
    stem, suffix = posixpath.splitext(path)
    if stem.endswith(_REJECTED):
        return Role(False, stem.removesuffix(_REJECTED) + suffix)
    return None if stem.endswith(_OTHERS) else Role(True, path)


_LAYOUTS = (
    *(Layout(f"{w}/NAME", f"{x}/NAME", partial(_role_by_folder, winners=w, losers=x)) for w, x in _FOLDERS),
    Layout("NAME", f"NAME{_REJECTED}", _role_by_label),
)


def layouts_in(files: Iterable[str]) -> list[Layout]:
    """The layouts of which some paths, with `/` between folders, hold winners and losers."""
    pictures = [path for path in files if beside.suffix_of(path) in {*SUFFIXES, *UNOPENED}]
    sides = [{role.won for path in pictures if (role := layout.role_of(path))} for layout in _LAYOUTS]
    return [layout for layout, found in zip(_LAYOUTS, sides, strict=True) if found == {True, False}]


def two_folders(place: str) -> tuple[Path, Path] | None:
    """The folders that `WINNERS,LOSERS` names; None where it does not.

    Raises:
        UserError: they are one.
    """
    winners, comma, losers = place.partition(",")
    if not (comma and os.path.isdir(winners) and os.path.isdir(losers)):
        return None
    if os.path.samefile(winners, losers):
        raise UserError(f"pairs {place}: is one folder twice; give that of the winners and that of the losers")
    return Path(winners), Path(losers)


def read(folder: Path, layout: Layout) -> Examples:
    """The pairs of a folder. What is left out is counted in warnings.

    Raises:
        UserError: a file cannot be read, or two may be the winner, the loser or the list of prompts.
    """
    files = files_below(folder)[0]
    roles = [(path, layout.role_of(path)) for path in files]
    won = [_File(path, role.name) for path, role in roles if role and role.won]
    lost = [_File(path, role.name) for path, role in roles if role and not role.won]
    yield from _pairs(folder, layout, (folder, won), (folder, lost), _prompts(folder, files))
    others = [path for path, role in roles if role is None and beside.suffix_of(path) in SUFFIXES]
    beside.say(folder, f"that are neither {layout.winner} nor {layout.loser}", others)


def read_two(winners: Path, losers: Path) -> Examples:
    """The pairs of two folders; see :func:`read`."""
    won, lost = ([_File(path, path) for path in files_below(folder)[0]] for folder in (winners, losers))
    layout = Layout(f"{winners}/NAME", f"{losers}/NAME", lambda _: None)
    yield from _pairs(winners, layout, (winners, won), (losers, lost), None)


def _pairs(
    place: Path,
    layout: Layout,
    winners: tuple[Path, Sequence[_File]],
    losers: tuple[Path, Sequence[_File]],
    prompts: Mapping[str, str] | None,
) -> Examples:
    """The pairs that are whole; the others are counted.

    Args:
        place: where they are, for warnings.
        layout: theirs.
        winners, losers: the folder that their paths begin in, and the files.
        prompts: name without folders and suffix → caption; None where captions lie beside the winners.
    """
    won, lost = (_pictures(*side) for side in (winners, losers))
    paths = [file.path for file in winners[1]]
    texts = {match.picture: match.texts for match in beside.match(winners[0], paths)[0]} if prompts is None else {}

    def caption_of(name: str) -> str | None:
        if prompts is None:
            return first_line(winners[0], texts.get(won[name], []))
        return prompts.get(posixpath.basename(name))

    without = []
    for name, path in won.items():
        if name not in lost:
            continue
        if caption := caption_of(name):
            yield Example(path, winners[0] / path, caption, split_of_folder(name), losers[0] / lost[name])
        else:
            without.append(path)
    beside.say(place, f"whose loser {layout.loser} is missing", [won[name] for name in won if name not in lost])
    beside.say(place, f"whose winner {layout.winner} is missing", [lost[name] for name in lost if name not in won])
    beside.say(place, f"without {'text beside them' if prompts is None else 'a prompt in the CSV file'}", without)
    beside.say_left_out(place, [], [*paths, *(file.path for file in losers[1])])


def _pictures(folder: Path, files: Sequence[_File]) -> dict[str, str]:
    """Name without suffix → path of the picture that has it. Raises UserError where two have."""
    found: dict[str, str] = {}
    for path, name in files:
        if beside.suffix_of(path) in SUFFIXES:
            stem = beside.stem_of(name)
            if stem in found:
                raise UserError(f"{folder}: {found[stem]} and {path} have one name in their pair, {stem}; which is it? "
                                "Take the other away, or rename it")  # fmt: skip
            found[stem] = path
    return found


def _prompts(folder: Path, files: Sequence[str]) -> dict[str, str] | None:
    """Uid → prompt of the CSV file that lies in a folder itself; None where none has these columns.

    Raises:
        UserError: two have, or a uid has two prompts.
    """
    tables = [folder / path for path in files if "/" not in path and beside.suffix_of(path) == ".csv"]
    lists = [path for path in tables if {_UID, _PROMPT} <= {*table.columns(path)}]
    if not lists:
        return None
    if len(lists) > 1:
        raise UserError(f"{folder}: {lists[0].name} and {lists[1].name} both have prompts; take one of them away")
    found: dict[str, str] = {}
    for number, row in table.read_rows(lists[0]):
        if found.setdefault(row[_UID], row[_PROMPT]) != row[_PROMPT]:
            raise UserError(f"{lists[0]} line {number}: {row[_UID]} has another prompt above; keep one of them")
    return found
