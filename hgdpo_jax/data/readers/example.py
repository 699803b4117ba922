"""What every reader of photographs gives."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hgdpo_jax.run.files import Member

# What other programs call our splits.
SPLITS = {name: "heldout" for name in ("heldout", "validation", "valid", "val", "test", "eval")} | {
    "train": "train",
    "base": "base",
}
CAPTIONS = ("caption", "text", "prompt")  # what the field of a caption is called


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


def caption_of(fields: Mapping[str, Any]) -> str | None:
    """The caption among some fields, None where there is none."""
    return next((fields[name] for name in CAPTIONS if isinstance(fields.get(name), str)), None)


def split_of_folder(name: str) -> str | None:
    """The split that the first folder of a relative path names."""
    first, slash, _ = name.partition("/")
    return SPLITS.get(first.lower()) if slash else None


def split_of_file(path: Path) -> str | None:
    """The split that a file such as train-00000-of-00012.parquet names."""
    return SPLITS.get(path.name.lower().replace("_", "-").partition("-")[0].partition(".")[0])
