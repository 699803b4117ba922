"""D_real: photographs with captions, in any form that :mod:`hgdpo_jax.data.readers` knows.

The splits are `train` (the curriculum learns from it), `heldout` (for evaluation) and `base` (for the base's own
training). Where photographs say which they belong to, the others are `train`; where none does, a share is held out, by
the hash of its content, so that a photograph stays in its split when it is renamed and, of 400 or more, whatever comes
beside it.
"""

import functools
import gc
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ml_collections import ConfigDict

from hgdpo_jax.data.readers import captions, imagefolder, kohya, parquet, preferences, sidecars, tar, tfds
from hgdpo_jax.data.readers.example import Example, Examples
from hgdpo_jax.pictures.read import UnreadableImage, image_shape
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import Member
from hgdpo_jax.run.index import Index

SPLITS = ("base", "train", "heldout")
HELDOUT, _LEAST = 0.02, 8  # the share, and how many at least, that are held out where nothing is marked


@dataclass(frozen=True)
class Photograph:
    """A photograph and a caption. The id is its name in its folder or archive; `#2`, … follow where further captions
    are of the same one, and `#mirrored` for its mirror image."""

    id: str
    picture: Path | Member
    caption: str
    split: str = "train"
    mirrored: bool = False
    loser: Path | Member | None = None  # of a pair that is given: the picture that lost against this one


@contextmanager
def _without_collection() -> Iterator[None]:
    """While many objects are made, Python looks for cycles among them again and again: half of the time that a list of
    300,000 photographs takes."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@_without_collection()
def list_photographs(
    place: str | Path,
    *splits: str,
    mirror: bool = False,
    heldout: float = HELDOUT,
    index: Index | None = None,
    given: bool = False,
) -> list[Photograph]:
    """The photographs of some splits, in the order of their list; with `mirror` each is followed by its mirror image.

    Every caption is an example of its own, several of one photograph too.

    Args:
        place: a folder, a file, or tfds:NAME.
        splits: some of SPLITS.
        mirror: whether mirror images are examples too.
        heldout: share that is held out where nothing is marked as that, at least eight (but no more than half).
        index: spares reading photographs whose content it knows.
        given: whether the place holds preference pairs: the photographs are their winners, which have losers.

    Raises:
        UserError: nothing that can be read, a line that is not as it should be, or none in these splits.
    """
    read = preferences.reader(place) if given else _reader(place)
    examples = list(read())
    split = {example.name: example.split or "train" for example in examples}
    # Files of many datasets are named train-…, whose others are not there, or never were.
    marked = any(example.split == "heldout" for example in examples)
    if not marked:
        split |= _by_content([e for e in examples if e.split in (None, "train")], heldout, index or Index())
    found: list[Photograph] = []
    seen: Counter[str] = Counter()
    for example in examples:
        seen[example.name] += 1
        role = (marked and example.split) or split[example.name]
        if role not in splits:
            continue
        name = example.name if seen[example.name] == 1 else f"{example.name}#{seen[example.name]}"
        photograph = Photograph(name, example.picture, example.caption, role, loser=example.loser)
        found.append(photograph)
        if mirror:
            found.append(replace(photograph, id=f"{name}#mirrored", mirrored=True))
    if not found:
        raise UserError(f"photographs {place}: none of the {len(examples)} is of split {' or '.join(splits)}; mark "
                        f"some as {splits[-1]}")  # fmt: skip
    twice = [name for name, count in Counter(p.id for p in found).items() if count > 1]
    if twice:
        raise UserError(f"photographs {place}: {twice[0]} names two examples; rename the file whose name ends in #")
    return found


def list_examples(config: ConfigDict, *splits: str, index: Index) -> list[list[Photograph]]:
    """What a stage learns from, or is evaluated on, of each split: photographs, or the pairs that are given.

    Args:
        config: of the stage.
        splits: some of SPLITS.
        index: see :func:`list_photographs`.

    Raises:
        UserError: see there; or none is in one of the splits.
    """
    given = config.pairs.winner == "given"
    data, place = config.data, config.data.pairs if given else config.data.photographs
    every = list_photographs(place, *splits, mirror=data.mirror, heldout=data.heldout, index=index, given=given)
    found = [[photograph for photograph in every if photograph.split == split] for split in splits]
    for split, photographs in zip(splits, found, strict=True):
        if not photographs:
            other = ", or set data.split" if split == "base" else ""
            raise UserError(f"photographs {place}: none of the {len(every)} is of split {split}; mark some as {split}"
                            f"{other}")  # fmt: skip
    return found


def _by_content(examples: Sequence[Example], heldout: float, index: Index) -> dict[str, str]:
    """Name → train, or heldout for those with the smallest hashes of their content."""
    index.learn(example.picture for example in examples)
    hashes: dict[str, str] = {}
    for example in examples:
        try:
            hashes[example.name] = index.hash(example.picture)
        except (OSError, ValueError):
            continue  # it cannot be read, and will be named where it is used
    share = sum(int(digest[:8], 16) < heldout * 16**8 for digest in hashes.values())
    count = min(max(share, _LEAST), len(hashes) // 2) if heldout else 0
    chosen = set(sorted(hashes, key=lambda name: (hashes[name], name))[:count])
    return {example.name: "heldout" if example.name in chosen else "train" for example in examples}


def _reader(place: str | Path) -> Callable[[], Examples]:
    """What reads a place, which its files tell.

    Raises:
        UserError: nothing does.
    """
    if str(place).startswith(tfds.PREFIX):
        return lambda: tfds.read(str(place).removeprefix(tfds.PREFIX))
    path = Path(place)
    if not str(place) or not path.exists():
        raise UserError(f"photographs {place}: no such file or folder; set --config.data.photographs")
    files = [path] if path.is_file() else sorted(entry for entry in path.iterdir() if entry.is_file())
    files += sorted(path.glob("data/*.parquet"))
    if path.is_file() and path.suffix == ".json":
        return lambda: kohya.read(path)
    if path.is_file() and path.suffix == ".jsonl":
        return lambda: captions.read(path)
    if (path / captions.NAME).is_file():
        return lambda: captions.read(path / captions.NAME)
    if path.is_dir() and imagefolder.lists_in(path):
        return lambda: imagefolder.read(path)
    for suffix, read in ((".tar", tar.read), (".parquet", parquet.read)):
        shards = [file for file in files if file.suffix == suffix]
        if shards:
            return functools.partial(read, shards)
    if path.is_dir() and any(sidecars.text_of(image) for image in sidecars.images_in(path)):
        return lambda: sidecars.read(path)
    raise UserError(f"photographs {place}: expects images with .txt files beside them, {captions.NAME}, "
                    f"{' or '.join(imagefolder.NAMES)}, kohya's .json, .tar or .parquet")  # fmt: skip


def sort_by_shape(
    photographs: Sequence[Photograph], resolutions: Mapping[str, tuple[int, int]], index: Index | None = None
) -> dict[str, list[Photograph]]:
    """Name of a resolution → the photographs whose height / width is nearest to its own on a logarithmic scale.

    One that cannot be read goes to the first; :func:`load_images` will name it. An index spares opening those it knows.
    """
    index = index or Index()
    found: dict[str, list[Photograph]] = {name: [] for name in resolutions}
    first = next(iter(found))
    shapes = {name: math.log(height / width) for name, (height, width) in resolutions.items()}
    for photograph in photographs:
        nearest = first
        if len(resolutions) > 1:
            try:
                height, width = index.shape(photograph.picture, image_shape)
            except (OSError, ValueError, UnreadableImage):
                pass
            else:
                shape = math.log(height / width)
                nearest = min(shapes, key=lambda name: abs(shapes[name] - shape))
        found[nearest].append(photograph)
    return found
