"""A dataset of TensorFlow Datasets, prepared as ArrayRecord, with an image and a text: `tfds:NAME`."""

from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from hgdpo_jax.data.readers.example import CAPTIONS, SPLITS, Example, Examples
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import Member

PREFIX = "tfds:"


def read(name: str) -> Examples:
    """Of NAME or NAME:VERSION. Raises UserError where it is not prepared, or has no image or no text."""
    prepare = (f"python -c \"import tensorflow_datasets as tfds; tfds.builder('{name}', file_format='array_record')"
               '.download_and_prepare()"')  # fmt: skip
    try:
        builder = tfds.builder(name)
        splits = list(builder.info.splits)
        features = builder.info.features
    except (tfds.core.DatasetNotFoundError, ImportError, AssertionError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{PREFIX}{name}: is not there ({reason}); prepare it with: {prepare}") from error
    if not splits:
        raise UserError(f"{PREFIX}{name}: is not prepared; prepare it with: {prepare}")
    image = next((key for key, f in features.items() if isinstance(f, tfds.features.Image)), None)
    texts = [key for key, f in features.items() if isinstance(f, tfds.features.Text)]
    if image is None or not texts:
        raise UserError(f"{PREFIX}{name}: has features {', '.join(features)}; expects an image and a text")
    text = next((key for key in CAPTIONS if key in texts), texts[0])
    for split in splits:
        source = _source(builder, split, image, prepare)
        for row in range(len(source)):
            caption = source[row][text].decode()
            yield Example(f"{split}/{row}", _picture(Path(builder.data_dir), source, split, row, image), caption,
                          SPLITS.get(split.lower()))  # fmt: skip


def _source(builder: Any, split: str, image: str, prepare: str) -> Any:
    try:
        return builder.as_data_source(split, decoders={image: tfds.decode.SkipDecoding()})
    except (NotImplementedError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{PREFIX}{builder.name}: cannot be read by row ({reason}); prepare it with: {prepare}"
        ) from error


def _picture(folder: Path, source: Any, split: str, row: int, image: str) -> Member:
    return Member(folder, f"{split} {row}", lambda: source[row][image])
