"""Settings that name one file or several: `PLACE`, or `NAME=PLACE,NAME=PLACE`."""

import re
from pathlib import Path
from typing import NamedTuple

SCORERS = ("pairs.scorer", "evaluate.scorer", "evaluate.other_scorer", "evaluate.scorers")
_NAMED = re.compile(r"([a-z][a-z0-9_]*)=(.+)", re.DOTALL)


class Place(NamedTuple):
    """A file or folder, and what it is called; empty where that is not said."""

    name: str
    path: str

    def __str__(self) -> str:
        return f"{self.name}={self.path}" if self.name else self.path


def places(text: str) -> list[Place]:
    """The places of a setting, in order; none of an empty one. What is a path as it stands is one place."""
    if not text:
        return []
    parts = [text] if _exists(text) else [part.strip() for part in text.split(",")]
    return [_place(part) for part in parts if part]


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except OSError:  # a list may be too long for a path
        return False


def _place(text: str) -> Place:
    found = None if _exists(text) else _NAMED.fullmatch(text)
    return Place(found[1], found[2]) if found else Place("", text)


def absolute(text: str) -> str:
    """The same with absolute paths, where they exist: later commands may run in another folder."""
    found = places(text)
    if not all(Path(place.path).exists() for place in found):
        return text
    return ",".join(str(place._replace(path=str(Path(place.path).absolute()))) for place in found)
