"""The pair record and its shards: a folder of ArrayRecord files that TensorFlow Datasets opens, with a manifest.

    W/stageN/pairs/pairs-train_1024x704.array_record-00000-of-00004   records, made one shard at a time
    W/stageN/pairs/dataset_info.json, features.json                   for tfds.builder_from_directory
    W/stageN/pairs/building.json                                      what the shards are made from, written first
    W/stageN/pairs/manifest.json                                      the same, counts and hashes, written last

There is a split for every resolution: its latents have one shape, and a batch comes from one split.
A record holds latents and token ids, never images or embeddings. For supervised fine-tuning there is no loser.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from hgdpo_jax.errors import UserError

Record = dict[str, Any]
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


def file_hash(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """JSON under a temporary name, then renamed: never half a file."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    os.replace(temporary, path)


def shard_path(folder: Path, split: str, index: int, count: int) -> Path:
    """The file of a shard, named as TFDS expects."""
    return folder / f"pairs-{split}.array_record-{index:05d}-of-{count:05d}"


def begin(folder: Path, made_from: Mapping[str, Any]) -> bool:
    """Prepares a folder for shards; True when they are all there already.

    Raises:
        UserError: it holds shards made from something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "building.json"
    if path.is_file():
        found = json.loads(path.read_text())
        if found != json.loads(json.dumps(made_from)):
            other = next(key for key in {**found, **made_from} if found.get(key) != made_from.get(key))
            raise UserError(f"pairs {folder}: were built with another {other}; remove the folder or choose a --workdir")
    else:
        write_json(path, made_from)
    return (folder / "manifest.json").is_file()


def write_shard(path: Path, schema: tfds.features.FeaturesDict, records: Iterable[Record]) -> None:
    """Writes one shard under a temporary name, then renames it.

    Raises:
        UserError: a latent is not finite (the photograph or caption is named), or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.partial")
    encoded = []
    for record in records:
        for name in ("winner", "loser", "concept"):
            if name in record and not np.isfinite(record[name]).all():
                raise UserError(
                    f"{name} of {record['id']}: NaN or infinite; its photograph or the base model is broken"
                )
        encoded.append(schema.serialize_example(record))
    needed, free = 2 * sum(map(len, encoded)), shutil.disk_usage(path.parent).free
    if free < needed:
        raise UserError(f"{path.parent}: {free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB needed; free some disk space")
    writer = ArrayRecordWriter(str(temporary), "group_size:1")
    for data in encoded:
        writer.write(data)
    writer.close()
    os.replace(temporary, path)


def finish(
    folder: Path,
    schema: tfds.features.FeaturesDict,
    shards: Mapping[str, Sequence[Path]],
    latents: Mapping[str, Sequence[int]],
) -> None:
    """Writes the TFDS metadata and, last, the manifest. A split without records is left out.

    Args:
        folder: that holds the shards.
        schema: of the records.
        shards: split (`train_1024x704`) → its files.
        latents: resolution → shape of its latents.

    Raises:
        UserError: there is not one record to train on, or not one held out.
    """
    made_from = json.loads((folder / "building.json").read_text())
    splits: dict[str, Any] = {}
    for split, paths in shards.items():
        entries = []
        for path in paths:
            reader = ArrayRecordReader(str(path))
            entries.append({"file": path.name, "records": reader.num_records(), "sha256": file_hash(path)})
            reader.close()
        records = sum(e["records"] for e in entries)
        if records:
            shape = list(latents[split.partition("_")[2]])
            splits[split] = {"records": records, "latent": shape, "shards": entries}
    for role in sorted({split.partition("_")[0] for split in shards}):
        if not any(split.startswith(f"{role}_") for split in splits):
            raise UserError(f"pairs {folder}: split {role} has no pair; no winner scored as high as its loser")
    tfds.folder_dataset.write_metadata(
        data_dir=str(folder),
        features=schema,
        split_infos=[
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[e["records"] for e in entry["shards"]],
                num_bytes=sum(path.stat().st_size for path in shards[split]),
                filename_template=tfds.core.ShardedFileTemplate(
                    data_dir=folder, dataset_name="pairs", split=split, filetype_suffix="array_record"
                ),
            )
            for split, entry in splits.items()
        ],
        filename_template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        check_data=False,
        description="HG-DPO preference pairs: latents and token ids.",
    )
    fields = {name: {"shape": list(f.shape), "dtype": np.dtype(f.np_dtype).name} for name, f in schema.items()}
    write_json(folder / "manifest.json", {"schema": fields, "splits": splits, "made_from": made_from})


@dataclass(frozen=True)
class Pairs:
    """Verified shards. `sources["train"]` and `sources["heldout"]` hold random-access TFDS sources of decoded records,
    one for each resolution."""

    folder: Path
    manifest: dict[str, Any]
    sources: Mapping[str, Sequence[Any]]

    @property
    def hash(self) -> str:
        """sha256 of the manifest, which holds the hashes of all shards."""
        return file_hash(self.folder / "manifest.json")

    def require(self, latents: Mapping[str, Sequence[int]]) -> None:
        """Raises UserError unless the latents have the shapes that a model and its config work on.

        Args:
            latents: resolution → (h, w, c).
        """
        for name, split in self.manifest["splits"].items():
            resolution, found = name.partition("_")[2], tuple(split["latent"])
            wanted = latents.get(resolution)
            if wanted is None:
                raise UserError(f"pairs {self.folder}: were built for {resolution}, data.resolutions of this config "
                                f"are {', '.join(latents)}; use those, or another --workdir")  # fmt: skip
            if found != tuple(wanted):
                raise UserError(f"pairs {self.folder}: latents of {resolution} are {found}, this model's are "
                                f"{tuple(wanted)}; remove the folder and build them again")  # fmt: skip

    def by_id(self, role: str) -> "RecordsById":
        """The records of all resolutions by their photograph's id, read when asked for."""
        return RecordsById(self.sources[role])


class RecordsById(Mapping[str, Record]):
    """id → record, in the order of the shards; texts are str."""

    def __init__(self, sources: Sequence[Sequence[Record]]) -> None:
        self._rows = {source[i]["id"].decode(): (source, i) for source in sources for i in range(len(source))}

    def __getitem__(self, name: str) -> Record:
        source, row = self._rows[name]
        record = source[row]
        return {key: value.decode() if isinstance(value, bytes) else value for key, value in record.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def open_pairs(folder: Path, build_command: str) -> Pairs:
    """Opens finished shards after checking every file against its hash.

    Args:
        folder: W/stageN/pairs.
        build_command: printed where the shards are missing.

    Raises:
        UserError: not built or not finished; a shard missing, truncated or altered.
    """
    if not (folder / "manifest.json").is_file():
        state = "are not finished" if (folder / "building.json").is_file() else "are missing"
        raise UserError(f"pairs {folder}: {state}; build them with: {build_command}")
    manifest = json.loads((folder / "manifest.json").read_text())
    for split in manifest["splits"].values():
        for entry in split["shards"]:
            path = folder / entry["file"]
            if not path.is_file():
                raise UserError(f"pair shard {path}: is missing; remove the folder and run: {build_command}")
            if file_hash(path) != entry["sha256"]:
                raise UserError(f"pair shard {path}: truncated or altered (its hash is not the manifest's); "
                                f"remove the folder and run: {build_command}")  # fmt: skip
    builder = tfds.builder_from_directory(str(folder))
    sources: dict[str, list[Any]] = {}
    for name in manifest["splits"]:
        sources.setdefault(name.partition("_")[0], []).append(builder.as_data_source(name))
    return Pairs(folder, manifest, sources)


def build_command(stage: str, workdir: Path) -> str:
    """What to type to build a stage's pairs."""
    script = "stage0_sft" if stage == "stage0" else stage
    return f"python -m hgdpo_jax.pairs --config configs/{script}.py[:variant] --workdir {workdir}"


def open_stage(workdir: Path, stage: str) -> Pairs:
    """The finished shards of a stage; see :func:`open_pairs`."""
    return open_pairs(workdir / stage / "pairs", build_command(stage, workdir))
