"""The pair record and its shards: a folder of ArrayRecord files that TensorFlow Datasets opens, with a manifest.

    W/stageN/pairs/pairs-train_1024x704.array_record-00000-of-00004   records, made one shard at a time
    W/stageN/pairs/….array_record-00000-of-00004.json                 its photographs, ids and hash: it is whole
    W/stageN/pairs/.….array_record-00000-of-00004.groups              some prompts each of a shard that is being made
    W/stageN/pairs/dataset_info.json, features.json                   for tfds.builder_from_directory
    W/stageN/pairs/building.json                                      what they are made from, with the first of them
    W/stageN/pairs/manifest.json                                      the same, counts and hashes, written last

There is a split for every resolution: its latents have one shape, and a batch comes from one split.
A record holds latents and token ids, never images or embeddings. For supervised fine-tuning there is no loser.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from hgdpo_jax.data.photographs import Photograph
from hgdpo_jax.data.record import Record
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import as_written, atomic_path, file_hash, json_hash, require_space, write_json
from hgdpo_jax.run.index import Index
from hgdpo_jax.run.provenance import require_same


def shard_path(folder: Path, split: str, index: int, count: int) -> Path:
    """The file of a shard, named as TFDS expects."""
    return folder / f"pairs-{split}.array_record-{index:05d}-of-{count:05d}"


def is_finished(folder: Path, made_from: Mapping[str, Any]) -> bool:
    """Whether the manifest of a folder of shards is written. Writes nothing.

    Args:
        folder: W/stageN/pairs, which need not exist.
        made_from: see :mod:`hgdpo_jax.run.provenance`.

    Raises:
        UserError: it holds shards made from something else.
    """
    path = folder / "building.json"
    if path.is_file():
        require_same(_made_from(folder), made_from, str(folder), "use that, or another --workdir")
    return (folder / "manifest.json").is_file()


def _made_from(folder: Path) -> dict[str, Any]:
    """What the shards of a folder are made from."""
    path = folder / "building.json"
    with as_written(path, "remove the folder, and its shards are made again"):
        return {**json.loads(path.read_text())}


def begin(folder: Path, made_from: Mapping[str, Any]) -> bool:
    """As :func:`is_finished`, and notes what the shards are made from. Each process does so once it has something to
    keep: a command that is refused before leaves the folder to others."""
    finished = is_finished(folder, made_from)
    if not (folder / "building.json").is_file():
        write_json(folder / "building.json", made_from, shared=True)
    return finished


class ShardPhotograph(NamedTuple):
    """A photograph that a shard is made of: its id; sha256 of its file, where its pixels are used and there is one; and
    whether it could be read."""

    id: str
    content: str | None = None
    readable: bool = True


def photographs_of_shard(photographs: Sequence[Photograph], index: Index | None) -> list[ShardPhotograph]:
    """With the content of their files as it is now; without an index, their pixels are not used."""

    def content(photograph: Photograph) -> str | None:
        try:
            if index and photograph.loser:
                return json_hash([index.hash(photograph.picture), index.hash(photograph.loser)])
            return index.hash(photograph.picture) if index else None
        except (OSError, ValueError):
            return None  # it is not there, or its name is none that a file can have

    return [ShardPhotograph(photograph.id, content(photograph)) for photograph in photographs]


def _note_of(shard: Path) -> Path:
    return shard.with_name(f"{shard.name}.json")


class Note(NamedTuple):
    """What is known of a shard: sha256 of its file, the ids of its records, and the examples that it is made of."""

    sha256: str
    records: list[str]
    examples: list[ShardPhotograph]


def read_note(shard: Path) -> Note:
    """The note of a shard. Raises UserError where it is damaged."""
    path = _note_of(shard)
    with as_written(path, "remove it, and its shard is made again"):
        found = json.loads(path.read_text())
        records = [str(name) for name in found["records"]]
        examples = [ShardPhotograph(*entry) for entry in found["examples"]]
        if not all(isinstance(example.content, str | None) for example in examples):
            raise ValueError("the content of a photograph is no hash")
        return Note(str(found["sha256"]), records, examples)


def is_whole(path: Path) -> bool:
    """Whether a shard is whole: its note is written last."""
    return path.is_file() and _note_of(path).is_file()


def is_made_of(path: Path, examples: Sequence[ShardPhotograph]) -> bool:
    """Whether a shard is made of these examples; not where a photograph that could not be read has changed since.

    Raises:
        UserError: it was made from other photographs.
    """
    found = read_note(path).examples
    if [example.id for example in found] != [example.id for example in examples]:
        raise UserError(f"pair shard {path}: is of other photographs than belong there now, whose shapes have changed; "
                        "use the former, or another --workdir")  # fmt: skip
    changed = [(was, now) for was, now in zip(found, examples, strict=True) if was.content != now.content]
    for was, now in changed:
        if was.readable:
            before, after = (f"sha256 {e.content[:12]}…" if e.content else "no file" for e in (was, now))
            raise UserError(f"photograph {now.id}: is {after}, pair shard {path} was made from {before}; use that "
                            "photograph, remove the shard to make it again, or choose another --workdir")  # fmt: skip
    return not changed


def encode(schema: tfds.features.FeaturesDict, records: Sequence[Record]) -> dict[str, bytes]:
    """Id → serialized record.

    Raises:
        UserError: a latent is not finite; the photograph or caption is named.
    """
    encoded, serializer = {}, ExampleSerializer(schema.get_serialized_info())
    for record in records:
        for name in ("winner", "loser", "concept"):
            if name in record and not np.isfinite(record[name]).all():
                raise UserError(
                    f"{name} of {record['id']}: NaN or infinite; its photograph or the base model is broken"
                )
        example = serializer.get_tf_example(schema.encode_example(record))
        encoded[record["id"]] = example.SerializeToString(deterministic=True)  # fields in one order in every process
    return encoded


def write_shard(
    path: Path, schema: tfds.features.FeaturesDict, records: Sequence[Record], examples: Sequence[ShardPhotograph] = ()
) -> str:
    """Writes one shard and its note; returns its sha256.

    Args:
        path: see :func:`shard_path`.
        schema: of the records.
        records: may be fewer than the examples.
        examples: what the shard is made of.

    Raises:
        UserError: a latent is not finite, or the disk is full.
    """
    return write_encoded(path, encode(schema, records), examples)


def write_encoded(path: Path, encoded: Mapping[str, bytes], examples: Sequence[ShardPhotograph]) -> str:
    """As :func:`write_shard`, from what :func:`encode` gives."""
    path.parent.mkdir(parents=True, exist_ok=True)
    require_space(path.parent, 2 * sum(map(len, encoded.values())), "a shard")
    _note_of(path).unlink(missing_ok=True)
    with atomic_path(path) as temporary:
        # Compressed latents are 8 % smaller, and take twice the time to read.
        writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
        for data in encoded.values():
            writer.write(data)
        writer.close()
    digest = file_hash(path)
    write_json(_note_of(path), {"sha256": digest, "records": [*encoded], "examples": examples}, indent=None)
    return digest


def group_path(path: Path, begin: int) -> Path:
    """The file of a part of a shard that is not whole yet, from its photograph `begin` on."""
    return path.with_name(f".{path.name}.groups") / f"{begin:06d}"


def is_group_of(path: Path, examples: Sequence[ShardPhotograph]) -> bool:
    """Whether a part of a shard is there, and made of these examples."""
    if not is_whole(path) or file_hash(path) != read_note(path).sha256:
        return False
    return [example._replace(readable=True) for example in read_note(path).examples] == list(examples)


def join(path: Path, groups: Sequence[Path]) -> str:
    """Makes a shard of its parts, which it takes away; returns its sha256."""
    notes = [read_note(group) for group in groups]
    ids = [name for note in notes for name in note.records]
    encoded = [data for group in groups for data in ArrayRecordReader(str(group)).read_all()]
    examples = [example for note in notes for example in note.examples]
    digest = write_encoded(path, dict(zip(ids, encoded, strict=True)), examples)
    shutil.rmtree(groups[0].parent)
    return digest


def described(schema: tfds.features.FeaturesDict) -> dict[str, Any]:
    """Field → shape and dtype, as the manifest says them."""
    return {name: {"shape": list(f.shape), "dtype": np.dtype(f.np_dtype).name} for name, f in schema.items()}


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
        UserError: there is not one record to train on, or not one held out. Shards without one record are removed, so
            that others can take their place.
    """
    made_from = _made_from(folder)
    splits: dict[str, Any] = {}
    notes = {split: [read_note(path) for path in paths] for split, paths in shards.items()}
    for split, paths in shards.items():
        entries = [
            {"file": path.name, "records": len(note.records), "sha256": note.sha256}
            for path, note in zip(paths, notes[split], strict=True)
        ]
        records = sum(len(note.records) for note in notes[split])
        if records:
            shape = list(latents[split.partition("_")[2]])
            splits[split] = {"records": records, "latent": shape, "shards": entries}
    if not splits:
        for path in (folder / "building.json", *(path for paths in shards.values() for path in paths)):
            path.unlink(missing_ok=True)
    for role in sorted({split.partition("_")[0] for split in shards}):
        if not any(split.startswith(f"{role}_") for split in splits):
            of_role = [note for split, found in notes.items() if split.startswith(f"{role}_") for note in found]
            made_of = [example for note in of_role for example in note.examples]
            if made_of and not any(example.readable for example in made_of):
                raise UserError(f"pairs {folder}: none of the {len(made_of)} photographs of split {role} can be read; "
                                "repair them and run again")  # fmt: skip
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
    write_json(folder / "manifest.json", {"schema": described(schema), "splits": splits, "made_from": made_from})
