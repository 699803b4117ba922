"""A dataset of TensorFlow Datasets, prepared as ArrayRecord, with an image and a text: `tfds:NAME`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from hgdpo_jax.data.readers.example import CAPTIONS, SPLITS, Example, Examples, as_captions, image_among
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import Member

PREFIX = "tfds:"


def read(name: str) -> Examples:
    """Of NAME or NAME:VERSION; a sequence of texts is an example for each.

    Raises:
        UserError: it is not prepared, is broken, or has no image or no text.
    """
    prepare = (f"prepare it with: python -c \"import tensorflow_datasets as tfds; tfds.builder('{name}', "
               "file_format='array_record').download_and_prepare()\"")  # fmt: skip
    place = Path(tfds.core.constants.DATA_DIR, name.replace(":", "/"))
    try:
        builder = tfds.builder(name)
        splits, features = list(builder.info.splits), builder.info.features
    except Exception as error:  # TFDS raises whatever it stumbles over
        if place.exists():
            raise UserError(f"{PREFIX}{name}: what {place} holds cannot be read ({_reason(error)}); remove that "
                            f"version and {prepare}") from error  # fmt: skip
        raise UserError(f"{PREFIX}{name}: is not there ({_reason(error)}); {prepare}") from error
    if not splits:
        raise UserError(f"{PREFIX}{name}: is not prepared; {prepare}")
    image = image_among([key for key, f in features.items() if isinstance(f, tfds.features.Image)])
    texts = {key: inside for key, feature in features.items() if (inside := _texts_in(feature)) is not None}
    if image is None or not texts:
        raise UserError(f"{PREFIX}{name}: has features {', '.join(features)}; expects an image and a text, and "
                        "where there are several images one called image")  # fmt: skip
    text = next((key for key in CAPTIONS if key in texts), next(iter(texts)))
    for split in splits:
        try:
            source = builder.as_data_source(split, decoders={image: tfds.decode.SkipDecoding()})
            captions = [_captions(source[row], text, texts[text]) for row in range(len(source))]
        except Exception as error:
            raise UserError(f"{PREFIX}{name}: split {split} cannot be read ({_reason(error)}); remove "
                            f"{builder.data_dir} and {prepare}") from error  # fmt: skip
        for row, found in enumerate(captions):
            for caption in found:
                yield Example(f"{split}/{row}", _picture(Path(builder.data_dir), source, split, row, image), caption,
                              SPLITS.get(split.lower()))  # fmt: skip


def _texts_in(feature: Any) -> str | None:
    """Where in a feature its texts are: "" in itself, or the name of a field of it; None where there are none."""
    inside = feature.feature if isinstance(feature, tfds.features.Sequence) else feature
    if isinstance(inside, tfds.features.Text):
        return ""
    fields = dict(inside.items()) if isinstance(inside, tfds.features.FeaturesDict) else {}
    return next((key for key in CAPTIONS if isinstance(fields.get(key), tfds.features.Text)), None)


def _captions(record: Mapping[str, Any], text: str, inside: str) -> list[str]:
    """Those of a record. Raises ValueError where they are cut off, or not UTF-8."""
    found = record[text][inside] if inside else record[text]
    values = [found] if isinstance(found, bytes) else found
    if values is None:
        raise ValueError("a record is cut off")
    return as_captions([value.decode() for value in values])


def _picture(folder: Path, source: Any, split: str, row: int, image: str) -> Member:
    def content() -> bytes:
        try:
            found = source[row][image]
        except Exception as error:
            raise OSError(_reason(error)) from error
        if not found:
            raise OSError("has no bytes")
        return found

    return Member(folder, f"{split} {row}", content)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
