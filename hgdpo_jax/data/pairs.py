"""The pair record and its shards: a folder of ArrayRecord files that TensorFlow Datasets opens, with a manifest.

    W/stageN/pairs/pairs-train_1024x704.array_record-00000-of-00004   records, made one shard at a time
    W/stageN/pairs/….array_record-00000-of-00004.json                 its photographs, ids and hash: it is whole
    W/stageN/pairs/.….array_record-00000-of-00004.groups              some prompts each of a shard that is being made
    W/stageN/pairs/dataset_info.json, features.json                   for tfds.builder_from_directory
    W/stageN/pairs/building.json                                      what the shards are made from, written first
    W/stageN/pairs/manifest.json                                      the same, counts and hashes, written last

There is a split for every resolution: its latents have one shape, and a batch comes from one split.
A record holds latents and token ids, never images or embeddings. For supervised fine-tuning there is no loser.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tensorflow_datasets.core.example_serializer import ExampleSerializer
from tensorflow_datasets.proto import tf_example_pb2

from hgdpo_jax import processes
from hgdpo_jax.data.photographs import Photograph
from hgdpo_jax.errors import UserError
from hgdpo_jax.files import Index, file_hash, json_hash, need_space, owner, whole, write_json
from hgdpo_jax.provenance import content, require_same

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


def shard_path(folder: Path, split: str, index: int, count: int) -> Path:
    """The file of a shard, named as TFDS expects."""
    return folder / f"pairs-{split}.array_record-{index:05d}-of-{count:05d}"


def begin(folder: Path, made_from: Mapping[str, Any]) -> bool:
    """Prepares a folder for shards; True when its manifest is written.

    Args:
        folder: W/stageN/pairs.
        made_from: see :mod:`hgdpo_jax.provenance`.

    Raises:
        UserError: it holds shards made from something else.
    """
    path = folder / "building.json"
    if path.is_file():
        require_same(json.loads(path.read_text()), made_from, str(folder), "use that, or another --workdir")
    else:
        write_json(path, made_from)
    return (folder / "manifest.json").is_file()


class Example(NamedTuple):
    """A photograph that a shard is made of: its id; sha256 of its file, where its pixels are used and there is one; and
    whether it could be read."""

    id: str
    content: str | None = None
    readable: bool = True


def examples_of(photographs: Sequence[Photograph], index: Index | None) -> list[Example]:
    """With the content of their files as it is now; without an index, their pixels are not used."""

    def content(photograph: Photograph) -> str | None:
        try:
            if index and photograph.loser:
                return json_hash([index.hash(photograph.picture), index.hash(photograph.loser)])
            return index.hash(photograph.picture) if index else None
        except OSError:
            return None

    return [Example(photograph.id, content(photograph)) for photograph in photographs]


def _note_of(shard: Path) -> Path:
    return shard.with_name(f"{shard.name}.json")


def _note(shard: Path) -> dict[str, Any]:
    return json.loads(_note_of(shard).read_text())


def is_there(path: Path) -> bool:
    """Whether a shard is whole: its note is written last."""
    return path.is_file() and _note_of(path).is_file()


def is_made_of(path: Path, examples: Sequence[Example]) -> bool:
    """Whether a shard is made of these examples; not where a photograph that could not be read has changed since.

    Raises:
        UserError: it was made from other photographs.
    """
    found = [Example(*entry) for entry in _note(path)["examples"]]
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


def write_shard(
    path: Path, schema: tfds.features.FeaturesDict, records: Sequence[Record], examples: Sequence[Example] = ()
) -> str:
    """Writes one shard and its note; returns its sha256.

    Args:
        path: see :func:`shard_path`.
        schema: of the records.
        records: may be fewer than the examples.
        examples: what the shard is made of.

    Raises:
        UserError: a latent is not finite (the photograph or caption is named), or the disk is full.
    """
    encoded, serializer = [], ExampleSerializer(schema.get_serialized_info())
    for record in records:
        for name in ("winner", "loser", "concept"):
            if name in record and not np.isfinite(record[name]).all():
                raise UserError(
                    f"{name} of {record['id']}: NaN or infinite; its photograph or the base model is broken"
                )
        example = serializer.get_tf_example(schema.encode_example(record))
        encoded.append(example.SerializeToString(deterministic=True))  # fields in one order in every process
    return _write(path, encoded, [record["id"] for record in records], examples)


def _write(path: Path, encoded: Sequence[bytes], ids: Sequence[str], examples: Sequence[Example]) -> str:
    need_space(path.parent, 2 * sum(map(len, encoded)), "a shard")
    _note_of(path).unlink(missing_ok=True)
    with whole(path) as temporary:
        # Compressed latents are 8 % smaller, and take twice the time to read.
        writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
        for data in encoded:
            writer.write(data)
        writer.close()
    digest = file_hash(path)
    write_json(_note_of(path), {"sha256": digest, "records": ids, "examples": examples}, indent=None)
    return digest


def group_path(path: Path, begin: int) -> Path:
    """The file of a part of a shard that is not whole yet, from its photograph `begin` on."""
    folder = path.with_name(f".{path.name}.groups")
    folder.mkdir(exist_ok=True)
    return folder / f"{begin:06d}"


def is_group_of(path: Path, examples: Sequence[Example]) -> bool:
    """Whether a part of a shard is there, and made of these examples."""
    if not is_there(path) or file_hash(path) != _note(path)["sha256"]:
        return False
    return [Example(*entry)._replace(readable=True) for entry in _note(path)["examples"]] == list(examples)


def join(path: Path, groups: Sequence[Path]) -> str:
    """Makes a shard of its parts, which it takes away; returns its sha256."""
    encoded = [data for group in groups for data in ArrayRecordReader(str(group)).read_all()]
    notes = [_note(group) for group in groups]
    ids = [name for note in notes for name in note["records"]]
    digest = _write(path, encoded, ids, [Example(*entry) for note in notes for entry in note["examples"]])
    shutil.rmtree(groups[0].parent)
    return digest


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
    notes = {split: [_note(path) for path in paths] for split, paths in shards.items()}
    for split, paths in shards.items():
        entries = [
            {"file": path.name, "records": len(note["records"]), "sha256": note["sha256"]}
            for path, note in zip(paths, notes[split], strict=True)
        ]
        records = sum(e["records"] for e in entries)
        if records:
            shape = list(latents[split.partition("_")[2]])
            splits[split] = {"records": records, "latent": shape, "shards": entries}
    for role in sorted({split.partition("_")[0] for split in shards}):
        if not any(split.startswith(f"{role}_") for split in splits):
            of_role = [note for split, found in notes.items() if split.startswith(f"{role}_") for note in found]
            made_of = [Example(*entry) for note in of_role for entry in note["examples"]]
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
    fields = {name: {"shape": list(f.shape), "dtype": np.dtype(f.np_dtype).name} for name, f in schema.items()}
    write_json(folder / "manifest.json", {"schema": fields, "splits": splits, "made_from": made_from})


@dataclass(frozen=True)
class Pairs:
    """Verified shards. `sources["train"]` and `sources["heldout"]` hold the records, a source for each resolution."""

    folder: Path
    manifest: dict[str, Any]
    sources: Mapping[str, Sequence["Records"]]

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

    def require_from(self, inputs: Mapping[str, str]) -> None:
        """Raises UserError where they were made from other inputs than what takes them is.

        Args:
            inputs: name of an input → hash of its content; of these the ones count that the manifest states.
        """
        wanted = {content(name): value for name, value in inputs.items()}
        stated = {name: value for name, value in self.manifest["made_from"].items() if name in wanted}
        known = {name: wanted[name] for name in stated}
        require_same(stated, known, f"pairs {self.folder}", "use that, or another --workdir")

    def is_from(self, inputs: Mapping[str, str]) -> bool:
        """Whether they were made from just these inputs: name → hash of the content."""
        return all(self.manifest["made_from"].get(content(name)) == value for name, value in inputs.items())

    def by_id(self, role: str) -> "RecordsById":
        """The records of all resolutions by their photograph's id, read when asked for."""
        splits = [split for name, split in self.manifest["splits"].items() if name.startswith(f"{role}_")]
        ids = [[i for e in split["shards"] for i in _note(self.folder / e["file"])["records"]] for split in splits]
        return RecordsById(self.sources[role], ids)


class Records(Sequence[Record]):
    """The records of a split, read when asked for: what TFDS decodes, with texts as bytes, but faster: for a record of
    64 KB TFDS takes several times as long to decode it as to read it.

    Args:
        source: of serialized records.
        schema: see :func:`features`.
    """

    def __init__(self, source: Sequence[bytes], schema: Mapping[str, Any]) -> None:
        self._source = source
        self._schema = {name: (np.dtype(feature.np_dtype), feature.shape) for name, feature in schema.items()}

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, i: int) -> Record:
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        fields = tf_example_pb2.Example.FromString(self._source[i]).features.feature
        return {name: _decoded(fields, name, *found) for name, found in self._schema.items()}


def _decoded(fields: Mapping[str, Any], name: str, dtype: np.dtype, shape: tuple[int | None, ...]) -> Any:
    """One value of a tf.train.Example: bytes, a number, or an array that cannot be written to."""
    if None in shape:  # TFDS writes two fields for it
        shape, name = tuple(fields[f"{name}/shape"].int64_list.value), f"{name}/value"
    field = fields[name]
    values = getattr(field, field.WhichOneof("kind")).value
    if shape == ():
        return values[0]
    return (np.frombuffer(values[0], dtype) if isinstance(values[0], bytes) else np.array(values, dtype)).reshape(shape)


class RecordsById(Mapping[str, Record]):
    """id → record, in the order of the shards; texts are str.

    Args:
        sources: of records.
        ids: of the records of each source.
    """

    def __init__(self, sources: Sequence[Sequence[Record]], ids: Sequence[Sequence[str]]) -> None:
        self._rows = {
            name: (source, i) for source, names in zip(sources, ids, strict=True) for i, name in enumerate(names)
        }

    def __getitem__(self, name: str) -> Record:
        source, row = self._rows[name]
        record = source[row]
        return {key: value.decode() if isinstance(value, bytes) else value for key, value in record.items()}

    def __contains__(self, name: object) -> bool:
        return name in self._rows  # what it inherits would read the record

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def open_pairs(folder: Path, build_command: str, index: Index | None = None) -> Pairs:
    """Opens finished shards after process 0 has checked every file against its hash.

    Args:
        folder: W/stageN/pairs.
        build_command: printed where the shards are missing.
        index: spares reading shards that it knows.

    Raises:
        UserError: not built or not finished; a shard missing, truncated or altered.
    """
    manifest = processes.first(lambda: _verified(folder, build_command, index or Index()))
    builder, raw = tfds.builder_from_directory(str(folder)), tfds.decode.DeserializeMethod.RAW_BYTES
    sources: dict[str, list[Records]] = {}
    for name in manifest["splits"]:
        records = Records(builder.as_data_source(name, deserialize_method=raw), builder.info.features)
        sources.setdefault(name.partition("_")[0], []).append(records)
    return Pairs(folder, manifest, sources)


def _verified(folder: Path, build_command: str, index: Index) -> dict[str, Any]:
    """The manifest of finished shards that are what it says."""
    if not (folder / "manifest.json").is_file():
        state, builder = "are missing", owner(folder)
        if (folder / "building.json").is_file():
            state = "are not finished" + (f", {builder} builds them" if builder else "")
        raise UserError(f"pairs {folder}: {state}; build them with: {build_command}")
    manifest = json.loads((folder / "manifest.json").read_text())
    for split in manifest["splits"].values():
        for entry in split["shards"]:
            path = folder / entry["file"]
            if not is_there(path):
                raise UserError(f"pair shard {path}: is missing; make it again with: {build_command}")
            if index.hash(path) != entry["sha256"]:
                raise UserError(f"pair shard {path}: truncated or altered (its hash is not the manifest's); "
                                f"remove it and run: {build_command}")  # fmt: skip
    return manifest


def build_command(stage: str, workdir: Path) -> str:
    """What to type to build a stage's pairs."""
    script = "stage0_sft" if stage == "stage0" else stage
    return f"python -m hgdpo_jax.pairs --config configs/{script}.py[:variant] --workdir {workdir}"


def open_stage(workdir: Path, stage: str, index: Index | None = None) -> Pairs:
    """The finished shards of a stage; see :func:`open_pairs`."""
    return open_pairs(workdir / stage / "pairs", build_command(stage, workdir), index)
