"""D_real: photographs with captions, in any form that :mod:`hgdpo_jax.data.readers` knows.

The splits are `train` (the curriculum learns from it), `heldout` (for evaluation) and `base` (for the base's own
training). Where photographs say which they belong to, the others are `train`; where none does, a share is held out, by
the hash of its content, so that a photograph stays in its split when it is renamed and, of 400 or more, whatever comes
beside it.
"""

import functools
import gc
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ml_collections import ConfigDict

from hgdpo_jax import config as configuration
from hgdpo_jax.data import resolutions
from hgdpo_jax.data.readers import captions, imagefolder, kohya, parquet, preferences, sidecars, tar, tfds
from hgdpo_jax.data.readers.beside import is_passed_over
from hgdpo_jax.data.readers.example import Example, Form
from hgdpo_jax.pictures.read import UnreadableImage, image_shape
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import Member
from hgdpo_jax.run.index import Index
from hgdpo_jax.run.progress import Progress

_Picture = str | Member  # a file's path in its shortest form
SPLITS = ("base", "train", "heldout")
HELDOUT, _LEAST = 0.02, 8  # the share, and how many at least, that are held out where nothing is marked
_THREADS = 8  # that open photographs to see their shapes


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
    prefix: str = "",
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
        prefix: put before each caption, see `data.caption_prefix`.

    Raises:
        UserError: nothing that can be read, a line that is not as it should be, captions of one photograph in several
            splits, or none in these splits.
    """
    what = f"{'pairs' if given else 'photographs'} {place}"
    examples = [_as_text(example, what) for example in _form(place, given).read()]
    if not examples:
        raise UserError(f"{what}: holds no {'whole pair' if given else 'photograph'} with a caption")
    found: list[Photograph] = []
    seen: Counter[str] = Counter()
    for example, role in zip(examples, _roles(examples, heldout, index or Index(), what), strict=True):
        seen[example.name] += 1
        if role not in splits:
            continue
        name = example.name if seen[example.name] == 1 else f"{example.name}#{seen[example.name]}"
        caption = f"{prefix.rstrip()} {example.caption}" if prefix else example.caption
        photograph = Photograph(name, example.picture, caption, role, loser=example.loser)
        found.append(photograph)
        if mirror:
            found.append(replace(photograph, id=f"{name}#mirrored", mirrored=True))
    if not found:
        raise UserError(f"{what}: none of the {len(examples)} is of split {' or '.join(splits)}; mark some as "
                        f"{splits[-1]}")  # fmt: skip
    twice = [name for name, count in Counter(p.id for p in found).items() if count > 1]
    if twice:
        raise UserError(f"{what}: {twice[0]} names two examples; rename the file whose name ends in #")
    return found


def _as_text(example: Example, what: str) -> Example:
    """An example whose name is text, as file names need not be. Raises UserError where its caption is not."""
    try:
        example.name.encode()
    except UnicodeEncodeError:
        example = example._replace(name=example.name.encode(errors="backslashreplace").decode())
    try:
        example.caption.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{what}: the caption of {example.name} holds half a character, "
                        f"{error.object[error.start]!a}; write it whole") from error  # fmt: skip
    return example


def list_examples(config: ConfigDict, *splits: str, index: Index) -> list[list[Photograph]]:
    """What a stage learns from, or is evaluated on, of each split: photographs, or the pairs that are given.

    Args:
        config: of the stage.
        splits: some of SPLITS.
        index: see :func:`list_photographs`.

    Raises:
        UserError: see there; or none is in one of the splits.
    """
    what, every = list_all(config, *splits, index=index)
    large = _large_enough(every, config, index)
    found = [[photograph for photograph in large if photograph.split == split] for split in splits]
    for split, photographs in zip(splits, found, strict=True):
        if not photographs and any(photograph.split == split for photograph in every):
            raise UserError(f"config key data.smallest={config.data.smallest}: leaves none of split {split}; lower it")
        if not photographs:
            other = ", or set data.split" if split == "base" else ""
            raise UserError(f"{what}: none of the {len(every)} is of split {split}; mark some as {split}{other}")
    return found


def choose_resolutions(config: ConfigDict, *splits: str, index: Index) -> list[str]:
    """The resolutions that suit the photographs of some splits; see :func:`hgdpo_jax.data.resolutions.choose`.

    Raises:
        UserError: see :func:`list_examples`; or none can be opened.
    """
    what, every = list_all(config, *splits, index=index)
    shapes = [shape for shape in shapes_of(every, index).values() if shape]
    if not shapes:
        raise UserError(f"{what}: none of the {len(every)} can be opened; is their folder mounted?")
    return [resolutions.name_of(size) for size in resolutions.choose(shapes, configuration.area(config))]


def list_all(config: ConfigDict, *splits: str, index: Index) -> tuple[str, list[Photograph]]:
    """The place of a config's photographs, or of the pairs that are given, in words; and those of some splits, however
    small they are, of which nothing is said.

    Raises:
        UserError: see :func:`list_photographs`.
    """
    place, given, data = *_place(config), config.data
    how = {"mirror": data.mirror, "heldout": data.heldout, "prefix": data.caption_prefix}
    every = list_photographs(place, *splits, index=index, given=given, **how)
    return f"{'pairs' if given else 'photographs'} {place}", every


def _place(config: ConfigDict) -> tuple[str, bool]:
    """Where a config's examples are, and whether they are pairs that are given."""
    given = config.pairs.winner == "given"
    return (config.data.pairs if given else config.data.photographs), given


def form_of(config: ConfigDict) -> str:
    """The form that a config's photographs, or given pairs, have, in words. Raises UserError where it is unknown."""
    return _form(*_place(config)).words


def shapes_of(photographs: Sequence[Photograph], index: Index) -> dict[Path | Member, resolutions.Size | None]:
    """Picture → (height, width); None where it cannot be read."""
    pictures = list({photograph.picture: None for photograph in photographs})
    with ThreadPoolExecutor(_THREADS) as threads:
        opened = threads.map(functools.partial(_shape_of, index=index), pictures)
        bar = Progress(opened, "photographs", len(pictures), unit="photograph", leave=False, delay=5)
        return dict(zip(pictures, bar, strict=True))


def _large_enough(photographs: Sequence[Photograph], config: ConfigDict, index: Index) -> list[Photograph]:
    """Those that are as large as `data.smallest` asks. Warns of them that are smaller than their resolution, of the
    others, and of resolutions that lie the wrong way. What cannot be read stays; :func:`load_images` will name it."""
    sizes, smallest = configuration.resolutions(config), config.data.smallest
    pictures = shapes_of(photographs, index)
    shapes = {picture: shape for picture, shape in pictures.items() if shape}
    _warn_of_orientation(list(shapes.values()), sizes)
    numbers = resolutions.nearest(list(shapes.values()), list(sizes.values()))
    scales = {}
    for (picture, shape), number in zip(shapes.items(), numbers, strict=True):
        height, width = list(sizes.values())[number]
        scales[picture] = min(shape[0] / height, shape[1] / width)
    enlarged = [picture for picture, scale in scales.items() if smallest <= scale < 1.0]
    dropped = {picture: None for picture, scale in scales.items() if scale < smallest}
    if enlarged:
        most = min(enlarged, key=lambda picture: scales[picture])
        logging.warning("%d of %d photographs are smaller than their resolution and are enlarged, %s the most, %.2f "
                        "times; data.smallest=1 leaves them out", len(enlarged), len(pictures), most,
                        1.0 / scales[most])  # fmt: skip
    if dropped:
        logging.warning("%d of %d photographs are smaller than data.smallest=%s times their resolution and are left "
                        "out, the first is %s", len(dropped), len(pictures), smallest, next(iter(dropped)))  # fmt: skip
    return [photograph for photograph in photographs if photograph.picture not in dropped]


def _warn_of_orientation(shapes: Sequence[resolutions.Size], sizes: Mapping[str, resolutions.Size]) -> None:
    """Warns of a resolution that is upright where no photograph is, or lies where none does, while its transpose, which
    would be like some of them, is not given: most programs write the width first."""
    upright, lying = any(h > w for h, w in shapes), any(w > h for h, w in shapes)
    for name, (height, width) in sizes.items():
        other = resolutions.name_of((width, height))
        own, theirs = (upright, lying) if height > width else (lying, upright)
        if height != width and theirs and not own and other not in sizes:
            kind = "higher than wide" if height > width else "wider than high"
            logging.warning("config key data.resolutions: %s is %d high and %d wide, but none of the %d photographs is "
                            "%s; the height comes first: did you mean %s?", name, height, width, len(shapes), kind,
                            other)  # fmt: skip


def _roles(examples: Sequence[Example], heldout: float, index: Index, what: str) -> list[str]:
    """The split of each example. Raises UserError where the captions of a photograph are marked as of several."""
    pictures = [os.path.normpath(e.picture) if isinstance(e.picture, Path) else e.picture for e in examples]
    marks: dict[_Picture, str | None] = {}
    for picture, example in zip(pictures, examples, strict=True):
        before = marks.get(picture)
        if before and example.split and before != example.split:
            raise UserError(f"{what}: {example.name} is marked as {before} and as {example.split}; mark all captions "
                            "of a photograph alike")  # fmt: skip
        marks[picture] = before or example.split
    # Files of many datasets are named train-…, whose others are not there, or never were.
    if "heldout" not in marks.values():
        unmarked = {picture: e.picture for picture, e in zip(pictures, examples, strict=True)}
        unmarked = {picture: place for picture, place in unmarked.items() if marks[picture] in (None, "train")}
        marks |= dict.fromkeys(_by_content(unmarked, heldout, index), "heldout")
    return [marks[picture] or "train" for picture in pictures]


def _by_content(pictures: Mapping[_Picture, Path | Member], heldout: float, index: Index) -> list[_Picture]:
    """Those with the smallest hashes of their content, which are held out; copies of a photograph go together."""
    index.learn(pictures.values())
    hashes: dict[str, list[_Picture]] = {}
    for picture, place in pictures.items():
        try:
            hashes.setdefault(index.hash(place), []).append(picture)
        except (OSError, ValueError):
            continue  # it cannot be read, and will be named where it is used
    readable = sum(map(len, hashes.values()))
    share = sum(len(alike) for digest, alike in hashes.items() if int(digest[:8], 16) < heldout * 16**8)
    count = min(max(share, _LEAST), readable // 2) if heldout else 0
    chosen: list[_Picture] = []
    for digest in sorted(hashes):
        if len(chosen) + len(hashes[digest]) <= count:
            chosen += hashes[digest]
    return chosen


def _form(place: str | Path, given: bool) -> Form:
    """The form of photographs, or of pairs that are given. Raises UserError where nothing reads it."""
    return preferences.form(place) if given else _form_of_photographs(place)


def _form_of_photographs(place: str | Path) -> Form:
    """The form of a place, which its files tell.

    Raises:
        UserError: nothing reads it.
    """
    if str(place).startswith(tfds.PREFIX):
        return Form("TensorFlow Datasets", lambda: tfds.read(str(place).removeprefix(tfds.PREFIX)))
    path = Path(place)
    if not str(place):
        raise UserError("config key data.photographs: is empty; set it to photographs in one of the forms of "
                        "docs/your-data.md")  # fmt: skip
    if not os.path.exists(path):
        raise UserError(f"photographs {place}: no such file or folder; set --config.data.photographs")
    files = [path] if path.is_file() else _shards_in(path)
    if path.is_file() and path.suffix.lower() == ".json":
        return Form("kohya's JSON", lambda: kohya.read(path))
    if path.is_file() and path.suffix.lower() == ".jsonl":
        return Form(path.name, lambda: captions.read(path))
    if (path / captions.NAME).is_file():
        return Form(captions.NAME, lambda: captions.read(path / captions.NAME))
    if path.is_dir() and imagefolder.lists_in(path):
        return Form("metadata as Hugging Face's imagefolder has it", lambda: imagefolder.read(path))
    for suffix, read in ((".tar", tar.read), (".parquet", parquet.read)):
        shards = [file for file in files if file.suffix.lower() == suffix]
        if shards:
            return Form(f"{len(shards)} {suffix} file{'s' if len(shards) > 1 else ''}", functools.partial(read, shards))
    if path.is_dir() and sidecars.lie_in(path):
        return Form("text files beside the images", lambda: sidecars.read(path))
    raise UserError(f"photographs {place}: expects images with .txt files beside them, {captions.NAME}, "
                    f"{' or '.join(imagefolder.NAMES)}, kohya's .json, .tar or .parquet")  # fmt: skip


def _shards_in(folder: Path) -> list[Path]:
    """The files of a folder, and the parquet of its folder `data`, where Hugging Face's hub has it."""
    try:
        found = sorted(entry for entry in folder.iterdir() if entry.is_file()) + sorted(folder.glob("data/*.parquet"))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from error
    return [file for file in found if not is_passed_over(file.name)]


def sort_by_shape(
    photographs: Sequence[Photograph], sizes: Mapping[str, resolutions.Size], index: Index | None = None
) -> dict[str, list[Photograph]]:
    """Name of a resolution → the photographs that have it; see :func:`hgdpo_jax.data.resolutions.nearest`.

    One that cannot be read goes to the first; :func:`load_images` will name it. An index spares opening those it knows.
    """
    index, names = index or Index(), list(sizes)
    found: dict[str, list[Photograph]] = {name: [] for name in names}
    shapes = [_shape_of(photograph.picture, index) if len(names) > 1 else None for photograph in photographs]
    numbers = iter(resolutions.nearest([shape for shape in shapes if shape], list(sizes.values())))
    for photograph, shape in zip(photographs, shapes, strict=True):
        found[names[next(numbers)] if shape else names[0]].append(photograph)
    return found


def _shape_of(picture: Path | Member, index: Index) -> resolutions.Size | None:
    """(height, width); None where it cannot be read."""
    try:
        return index.shape(picture, image_shape)
    except (OSError, ValueError, UnreadableImage):
        return None
