"""Pictures and the texts beside them, among the names of the files of a folder or of the members of an archive."""

import logging
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from hgdpo_jax.data.readers.example import IMAGE
from hgdpo_jax.pictures.read import SUFFIXES, UNOPENED
from hgdpo_jax.run.errors import UserError

TEXTS = (".txt", ".caption")


class Match(NamedTuple):
    """A picture and its texts.

    Attributes:
        picture: its name.
        texts: the names of its texts; the first that holds something counts.
        name: what they have in common.
    """

    picture: str
    texts: list[str]
    name: str


def is_passed_over(name: str) -> bool:
    """Whether a path leads to what systems and programs keep for themselves: hidden files and folders, such as macOS's
    ._a.jpg and .ipynb_checkpoints, __MACOSX, and the small pictures of network drives."""
    return any(
        (part.startswith(".") and part not in (".", "..")) or part in ("__MACOSX", "@eaDir") for part in name.split("/")
    )


def suffix_of(name: str) -> str:
    """The last suffix of a path, in lower case."""
    return posixpath.splitext(name)[1].lower()


def stem_of(name: str) -> str:
    """A path without its last suffix."""
    return name.rpartition(".")[0]


def match(
    place: Path, names: Sequence[str], kinds: Sequence[str] = TEXTS, by_key: bool = False
) -> tuple[list[Match], list[str]]:
    """The pictures with text, and those without.

    The text of `a.1.jpg` is `a.1.txt` or `a.1.jpg.txt`.

    Args:
        place: where they are, for errors.
        names: of all files, with `/` between folders.
        kinds: suffixes of texts, in the order in which they count.
        by_key: whether files of WebDataset's key, which is what stands before the first dot, are of one example where
            no text has a picture's name: `a.image.jpg` and `a.caption.txt`.

    Raises:
        UserError: two pictures have one text: one is perhaps a mask.
    """
    pictures = [name for name in names if suffix_of(name) in SUFFIXES]
    texts = _by(stem_of, sorted((n for n in names if suffix_of(n) in kinds), key=lambda n: kinds.index(suffix_of(n))))
    alike = Counter(map(stem_of, pictures))
    found: dict[str, Match] = {}
    owners: dict[str, str] = {}
    for picture in pictures:
        stem = stem_of(picture)
        shared, own = texts.get(stem, []), texts.get(picture, [])
        if shared and not (own and alike[stem] > 1):
            if stem in owners:
                raise _two(place, (owners[stem], picture), shared)
            owners[stem] = picture
            found[picture] = Match(picture, shared + own, stem)
        elif own:
            found[picture] = Match(picture, own, picture)
    if by_key:
        found |= _match_keys(place, [p for p in pictures if p not in found], texts, {_key(p) for p in found})
    return [found[p] for p in pictures if p in found], [p for p in pictures if p not in found]


def _match_keys(place: Path, pictures: Sequence[str], texts: dict[str, list[str]], taken: set[str]) -> dict[str, Match]:
    """The matches by key, but for the keys that have an example."""
    found, by_key = {}, _by(_key, [text for named in texts.values() for text in named])
    for key, of_key in _by(_key, pictures).items():
        if key in taken or key not in by_key:
            continue
        # Of several, the one that is called nothing but the key, or `image`.
        plain = [p for p in of_key if stem_of(p) == key] or [p for p in of_key if stem_of(p) == f"{key}.{IMAGE}"]
        if len(of_key) > 1 and len(plain) != 1:
            raise _two(place, of_key, by_key[key])
        picture = (plain or of_key)[0]
        found[picture] = Match(picture, by_key[key], key)
    return found


def _two(place: Path, pictures: Sequence[str], texts: Sequence[str]) -> UserError:
    return UserError(f"{place}: {pictures[0]} and {pictures[1]} have one text, {texts[0]}; which is the photograph? "
                     "Take the other away, or rename it")  # fmt: skip


def _by(what: Callable[[str], str], names: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(what(name), []).append(name)
    return found


def _key(name: str) -> str:
    """A path up to the first dot of its file's name."""
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.partition('.')[0]}"


def say_left_out(place: Path, without: Sequence[str], names: Sequence[str]) -> None:
    """Warns of pictures without text, and of photographs among some names that cannot be opened here."""
    say(place, "without text beside them", without)
    unopened = [name for name in names if suffix_of(name) in UNOPENED]
    for advice, found in _by(lambda name: UNOPENED[suffix_of(name)], unopened).items():
        kinds = ", ".join(sorted(set(map(suffix_of, found))))
        say(place, f"that cannot be opened here ({kinds}: {advice})", found)


def say(place: Path, which: str, names: Sequence[str]) -> None:
    """Warns of images that are left out: how many, and the first."""
    if names:
        logging.warning("%s: %d images %s are left out, the first is %s", place, len(names), which, names[0])
