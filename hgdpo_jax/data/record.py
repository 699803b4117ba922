"""The pair record: what a training example is on disk."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
import tensorflow_datasets as tfds

Record = dict[str, Any]


@runtime_checkable
class RecordSource(Protocol):
    """Records in an order, read when asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Record: ...


class WithScores:
    """Records that bring the scores of winner and loser, float32 [2], to the step as `scores`."""

    def __init__(self, records: RecordSource) -> None:
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int, /) -> Record:
        record = self._records[i]
        return record | {"scores": np.array([record["winner_score"], record["loser_score"]], np.float32)}


ENCODED = ("encoder_hidden_states", "text_embeds")  # of :class:`hgdpo_jax.models.text.Encoded`


class WithText:
    """Records that bring what text encoders made of their captions, as :data:`ENCODED`.

    Args:
        records: with `input_ids`.
        tokens: so many of them are a caption's.
        find: bytes of these ids → what was made of them.
    """

    def __init__(self, records: RecordSource, tokens: int, find: Callable[[bytes], Record]) -> None:
        self._records, self._tokens, self._find = records, tokens, find

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int, /) -> Record:
        record = self._records[i]
        return record | self._find(record["input_ids"][: self._tokens].tobytes())


LATENT = np.float16


def features(
    channels: int, tokens: int, loser: bool, concept: tuple[int, int] | None = None
) -> tfds.features.FeaturesDict:
    """The schema: ids, caption, token ids int32, latents float16 [h, w, c], and who won by how much; or, for an
    adapter, the features float16 [m, f] of the concept image."""
    latent = tfds.features.Tensor(shape=(None, None, channels), dtype=LATENT, encoding="bytes")
    fields: dict[str, Any] = {
        "id": tfds.features.Text(),
        "caption": tfds.features.Text(),
        "input_ids": tfds.features.Tensor(shape=(tokens,), dtype=np.int32),
        "winner": latent,
        "winner_number": tfds.features.Scalar(np.int32),  # which of the pool, or which strength
        "winner_score": tfds.features.Scalar(np.float32),
    }
    if loser:
        fields |= {"loser": latent, "loser_score": tfds.features.Scalar(np.float32)}
    if concept:
        fields["concept"] = tfds.features.Tensor(shape=concept, dtype=LATENT, encoding="bytes")
    return tfds.features.FeaturesDict(fields)
