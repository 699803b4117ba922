"""The reference's predictions, computed once: for `train.reference_cache` draws of noise of each pair, K below.

    W/stageN/reference_cache/SHARD.npy   those for a shard's winners and losers: [pairs, K, 2, h, w, c] float32

See :mod:`hgdpo_jax.training.kept` for what lies beside them. A draw of a pair takes 8 · h · w · c bytes, 128 KiB at
512x512 and 512 KiB at 1024x1024. Predictions are kept and not errors, whose differences would cancel, see
:func:`hgdpo_jax.training.objectives.Compared`.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from hgdpo_jax.data.loader import stack_records
from hgdpo_jax.data.pairs import Pairs
from hgdpo_jax.data.record import Record, RecordSource
from hgdpo_jax.devices.sharding import replicated
from hgdpo_jax.devices.transfer import local_rows, one_ahead, to_devices, to_host
from hgdpo_jax.run import processes, provenance
from hgdpo_jax.run.index import Index
from hgdpo_jax.run.progress import Progress
from hgdpo_jax.training import kept
from hgdpo_jax.training import step as steps
from hgdpo_jax.training.inputs import Inputs
from hgdpo_jax.training.optimizer import numbers_of
from hgdpo_jax.training.policy import draws_otherwise
from hgdpo_jax.training.start import Start


class Draws:
    """Every record K times, each time as another `example`, int32, which decides its noise.

    Args:
        records: of a resolution.
        draws: K.
        parts: predictions of the reference, shard by shard, which records then bring as `reference`.
    """

    def __init__(
        self, records: RecordSource, draws: int, parts: Sequence[Float[np.ndarray, "_ k 2 h w c"]] = ()
    ) -> None:
        self._records, self._draws, self._parts = records, draws, parts
        self._begins = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return len(self._records) * self._draws

    def __getitem__(self, i: int) -> Record:
        number, draw = divmod(i, self._draws)
        record = self._records[number] | {"example": np.int32(i)}
        if self._parts:
            part = int(np.searchsorted(self._begins, number, side="right")) - 1
            record["reference"] = self._parts[part][number - self._begins[part], draw]
        return record


class Shard(NamedTuple):
    """The predictions for a shard of pairs.

    Attributes:
        path: their file.
        resolution: number of the source that holds the pairs.
        begin, pairs: the first of them there, and how many they are.
        latent: (h, w, c).
    """

    path: Path
    resolution: int
    begin: int
    pairs: int
    latent: tuple[int, int, int]

    def rows(self, draws: int) -> kept.Rows:
        """A row of predictions for each pair."""
        return kept.Rows(self.path, (self.pairs, draws, 2, *self.latent), np.dtype(np.float32))


def _shards(cache: Path, manifest: Mapping[str, Any]) -> list[Shard]:
    """The shards of all pairs to train on, in the order of their sources."""
    found = []
    splits = [split for name, split in manifest["splits"].items() if name.startswith("train_")]
    for resolution, split in enumerate(splits):
        begin = 0
        for entry in split["shards"]:
            path = cache / f"{entry['file'].replace('/', '.')}.npy"  # of joined pairs, in several folders
            found.append(Shard(path, resolution, begin, entry["records"], tuple(split["latent"])))
            begin += entry["records"]
    return found


def bytes_of_predictions(config: ConfigDict, pairs: Pairs) -> int:
    """Bytes of the predictions for all pairs to train on."""
    return sum(shard.rows(config.train.reference_cache).size for shard in _shards(Path(), pairs.manifest))


def attach(config: ConfigDict, folder: Path, inputs: Inputs, start: Start, index: Index) -> Inputs:
    """The inputs with pairs that bring the reference's predictions, which are computed where they are missing.

    Args:
        config, inputs, start: of the stage.
        folder: W/stageN.
        index: spares reading files that it knows.

    Raises:
        UserError: the folder holds predictions of something else, or one that was altered; one is not finite; the disk
            is full.
    """
    cache, draws, train = folder / "reference_cache", config.train.reference_cache, inputs.pairs.sources["train"]
    base = inputs.made_from[provenance.content_key("model.base")]
    made_from = _made_from(config, {"model.base": base, "the pairs": inputs.pairs.hash,
                                    "the reference": start.reference_hash})  # fmt: skip
    shards = _shards(cache, inputs.pairs.manifest)
    files = [shard.rows(draws) for shard in shards]
    todo = kept.missing(cache, files, made_from, "what the reference predicts")
    size = sum(rows.size for rows in files)
    print(f"{config.stage}: keeps the reference's predictions for {draws} draws of noise of {sum(map(len, train)):,} "
          f"pairs, {size / 1e9:,.2f} GB; {config.train.steps * config.train.batch:,} examples use them")  # fmt: skip
    _make(config, [shards[i] for i in todo], inputs, start.reference, made_from)
    parts: list[list[np.ndarray]] = [[] for _ in train]
    for shard, values in zip(shards, kept.opened(files, index), strict=True):
        parts[shard.resolution].append(values)
    sources = [Draws(records, draws, found) for records, found in zip(train, parts, strict=True)]
    return inputs._replace(pairs=replace(inputs.pairs, sources={**inputs.pairs.sources, "train": sources}))


def _made_from(config: ConfigDict, content: Mapping[str, str]) -> dict[str, Any]:
    keys = ["stage", "seed", "model.dtype", "train.reference_cache"]
    keys += ["train.lora_alpha"] if config.train.params.endswith("lora") else []  # which is in no weight
    keys += ["train.quantize"] if config.train.quantize != "none" else []
    keys += ["train.noise_levels", "train.noise_shift"] if draws_otherwise(config) else []
    return provenance.settings(config, keys) | {provenance.content_key(name): x for name, x in content.items()}


def _make(
    config: ConfigDict, todo: Sequence[Shard], inputs: Inputs, reference: steps.Params, made_from: Mapping[str, Any]
) -> None:
    """Computes and writes some shards, as many examples at a time as a microbatch has."""
    draws, size = config.train.reference_cache, config.train.batch // config.train.accumulate
    denoiser = steps.split_params(inputs.pipeline, config.train.params)[0]
    numbers, rows_here = numbers_of(config, 0), local_rows(size, inputs.mesh)

    @jax.jit(out_shardings=replicated(inputs.mesh))
    def predicted(
        reference: steps.Params, frozen: steps.Params, batch: steps.Batch, numbers: steps.Numbers
    ) -> Float[Array, "b 2 h w c"]:
        batch = batch | {"key": steps.example_keys(numbers, batch["example"])}
        return steps.predict_pairs(denoiser, inputs.pipeline.schedule, reference, frozen, batch)

    with Progress(total=draws * sum(s.pairs for s in todo), desc="reference", unit="draw") as bar:
        for shard in todo:
            source = Draws(inputs.pairs.sources["train"][shard.resolution], draws)
            begin, end = draws * shard.begin, draws * (shard.begin + shard.pairs)

            def start(number: int, source: Draws = source, end: int = end) -> tuple[int, Array]:
                """Gives the devices the examples from `number` on; the shard's last one fills up the batch."""
                batch = stack_records(source, [min(number + row, end - 1) for row in rows_here])
                return number, predicted(reference, inputs.frozen, to_devices(batch, inputs.mesh), numbers)

            with kept.written(shard.rows(draws), made_from) if processes.is_first() else nullcontext() as values:
                for number, found in one_ahead(start, range(begin, end, size)):
                    rows = to_host(found)[: end - number]
                    what = f"what the reference predicts of {shard.path.stem}"
                    kept.require_finite(rows, what, "its policy or the pairs are broken")
                    if values is not None:
                        examples = values.reshape(-1, *values.shape[2:])
                        examples[number - begin : number - begin + len(rows)] = rows
                    bar.update(len(rows))
    processes.barrier()
