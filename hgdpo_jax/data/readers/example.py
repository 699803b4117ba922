"""What every reader of photographs gives."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hgdpo_jax.run.files import Member

# What other programs call our splits.
SPLITS = {name: "heldout" for name in ("heldout", "validation", "valid", "val", "test", "eval")} | {
    "train": "train",
    "base": "base",
}
CAPTIONS = ("caption", "text", "prompt")  # what the field of a caption is called
IMAGE = "image"  # what that of the photograph is called where there are several pictures


class Example(NamedTuple):
    """A photograph and a caption.

    Attributes:
        name: of the photograph where it was found, the same wherever that lies.
        picture: its file, or where in a file it is.
        caption: text.
        split: base, train or heldout, where that is said.
        loser: of a pair that is given, in which the picture is the winner.
    """

    name: str
    picture: Path | Member
    caption: str
    split: str | None = None
    loser: Path | Member | None = None


Examples = Iterator[Example]


class Form(NamedTuple):
    """A form that photographs or pairs have on disk: in words, as in "captions from …"; and what reads it."""

    words: str
    read: Callable[[], Examples]


def captions_of(fields: Mapping[str, Any]) -> list[str]:
    """The captions among some fields, which are a text or a list of texts; none where there is none."""
    return next((found for name in CAPTIONS if (found := as_captions(fields.get(name)))), [])


def as_captions(value: Any) -> list[str]:
    """A text, or the texts of a list; none of anything else."""
    return [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]


def image_among(names: Sequence[str]) -> str | None:
    """The field of the photograph among those that hold pictures: the only one, or the one that is called `image`."""
    return names[0] if len(names) == 1 else IMAGE if IMAGE in names else None


def split_of_folder(name: str) -> str | None:
    """The split that the first folder of a relative path names."""
    first, slash, _ = name.partition("/")
    return SPLITS.get(first.lower()) if slash else None


def split_of_file(path: Path) -> str | None:
    """The split that a file such as train-00000-of-00012.parquet names."""
    return SPLITS.get(path.name.lower().replace("_", "-").partition("-")[0].partition(".")[0])
