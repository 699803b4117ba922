"""The pair record and its shards: a folder of ArrayRecord files that TensorFlow Datasets opens, with a manifest.

    W/stageN/pairs/pairs-train_1024x704.array_record-00000-of-00004   records, made one shard at a time
    W/stageN/pairs/….array_record-00000-of-00004.json                 its photographs, ids and hash: it is whole
    W/stageN/pairs/.….array_record-00000-of-00004.groups              some prompts each of a shard that is being made
    W/stageN/pairs/dataset_info.json, features.json                   for tfds.builder_from_directory
    W/stageN/pairs/building.json                                      what the shards are made from, written first
    W/stageN/pairs/manifest.json                                      the same, counts and hashes, written last
    W/stageN/pairs/ratings.json                                       which of them people dropped or swapped, if any

There is a split for every resolution: its latents have one shape, and a batch comes from one split.
A record holds latents and token ids, never images or embeddings. For supervised fine-tuning there is no loser.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from hgdpo_jax.data.ratings import NAME as RATINGS
from hgdpo_jax.data.ratings import RatedRecords, Ratings, read_kept
from hgdpo_jax.data.record import Record, RecordSource
from hgdpo_jax.data.shards import described, is_whole, read_note
from hgdpo_jax.run import processes
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import as_written, file_hash, is_passing, json_hash
from hgdpo_jax.run.folder import stage_command
from hgdpo_jax.run.index import Index
from hgdpo_jax.run.locks import lock_owner
from hgdpo_jax.run.provenance import content_key, require_same


@dataclass(frozen=True)
class Pairs:
    """Verified shards. `sources["train"]` and `sources["heldout"]` hold the records, a source for each resolution.

    Where people rated pairs, `manifest` and `sources` are of the pairs as rated, and `ratings` says how. `hash` is the
    sha256 of the manifest, which holds the hashes of all shards, and of what ratings change.
    """

    folder: Path
    manifest: dict[str, Any]
    sources: Mapping[str, Sequence[RecordSource]]
    hash: str
    ratings: Ratings = field(default_factory=Ratings)

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
        wanted = {content_key(name): value for name, value in inputs.items()}
        stated = {name: value for name, value in self.manifest["made_from"].items() if name in wanted}
        known = {name: wanted[name] for name in stated}
        require_same(stated, known, f"pairs {self.folder}", "use that, or another --workdir")

    def is_from(self, inputs: Mapping[str, str]) -> bool:
        """Whether they were made from just these inputs: name → hash of the content."""
        return all(self.manifest["made_from"].get(content_key(name)) == value for name, value in inputs.items())

    def by_id(self, role: str) -> "RecordsById":
        """The records of all resolutions by their photograph's id, read when asked for."""
        splits = [split for name, split in self.manifest["splits"].items() if name.startswith(f"{role}_")]
        ids = [[i for e in split["shards"] for i in self.ids_in(e)] for split in splits]
        return RecordsById(self.sources[role], ids)

    def ids_in(self, entry: Mapping[str, Any]) -> list[str]:
        """The ids of a shard's records. Raises UserError where its note and the manifest disagree.

        Args:
            entry: the shard's in the manifest.
        """
        path, dropped = self.folder / entry["file"], self.ratings.dropped
        ids = [name for name in read_note(path).records if name not in dropped]
        if len(set(ids)) != entry["records"]:
            raise UserError(f"pair shard {path}: its note names {len(set(ids))} records, the manifest "
                            f"{entry['records']}; remove it, its note and the manifest, and build again")  # fmt: skip
        return ids


class Records:
    """The records of a split, read when asked for: what TFDS decodes, with texts as bytes, but faster: for a record of
    64 KB TFDS takes several times as long to decode it as to read it.

    Args:
        source: of serialized records.
        schema: see :func:`features`.
    """

    def __init__(self, source: Sequence[bytes], schema: tfds.features.FeaturesDict) -> None:
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

    def __init__(self, sources: Sequence[RecordSource], ids: Sequence[Sequence[str]]) -> None:
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
    manifest = processes.broadcast(lambda: _verified(folder, build_command, index or Index()))
    sources: dict[str, list[Records]] = {}
    try:
        builder, raw = tfds.builder_from_directory(str(folder)), tfds.decode.DeserializeMethod.RAW_BYTES
        if described(builder.info.features) != manifest["schema"]:
            raise ValueError("features.json has other fields than the manifest")
        for name, split in manifest["splits"].items():
            info = builder.info.splits[name]
            files = dict(zip(map(Path, info.filepaths), info.shard_lengths, strict=True))
            if files != {Path(builder.data_dir, entry["file"]): entry["records"] for entry in split["shards"]}:
                raise ValueError(f"dataset_info.json has other files of {name} than the manifest, or of other lengths")
            records = Records(builder.as_data_source(name, deserialize_method=raw), builder.info.features)
            sources.setdefault(name.partition("_")[0], []).append(records)
    except Exception as error:  # of TFDS, of protocol buffers and of ArrayRecord, which share no class
        if is_passing(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"pairs {folder}: TFDS cannot open them ({reason}); remove manifest.json there and run: "
                        f"{build_command}") from error  # fmt: skip
    found = Pairs(folder, manifest, sources, file_hash(folder / "manifest.json"))
    ratings = Ratings(processes.broadcast(lambda: dict(read_kept(folder, found.hash).better)))
    return as_rated(found, ratings) if ratings.better else found


def as_rated(pairs: Pairs, ratings: Ratings) -> Pairs:
    """The pairs as people rated them; a shard, a resolution or a role of which nothing is left is left out.

    Args:
        pairs: as they were built.
        ratings: theirs.

    Raises:
        UserError: they rate what is no pair.
    """
    splits: dict[str, Any] = {}
    sources: dict[str, list[RecordSource]] = {}
    built = {role: iter(found) for role, found in pairs.sources.items()}
    strangers = set(ratings.better)
    for name, split in pairs.manifest["splits"].items():
        role, ids = name.partition("_")[0], [pairs.ids_in(entry) for entry in split["shards"]]
        source = RatedRecords(next(built[role]), [i for of_shard in ids for i in of_shard], ratings)
        strangers -= {i for of_shard in ids for i in of_shard}
        left = [sum(i not in ratings.dropped for i in of_shard) for of_shard in ids]
        entries = [entry | {"records": n} for entry, n in zip(split["shards"], left, strict=True) if n]
        if entries:
            splits[name] = split | {"records": len(source), "shards": entries}
            sources.setdefault(role, []).append(source)
    if strangers:
        raise UserError(f"{pairs.folder / RATINGS}: rates {min(strangers)}, which is no pair there; remove it, and "
                        "give the ratings to pairs again")  # fmt: skip
    rated = json_hash([pairs.hash, ratings.hash]) if ratings.hash else pairs.hash
    return replace(pairs, manifest=pairs.manifest | {"splits": splits}, sources=sources, hash=rated, ratings=ratings)


def _verified(folder: Path, build_command: str, index: Index) -> dict[str, Any]:
    """The manifest of finished shards that are what it says."""
    if not (folder / "manifest.json").is_file():
        state, builder = "are missing", lock_owner(folder)
        if (folder / "building.json").is_file():
            state = "are not finished" + (f", {builder} builds them" if builder else "")
        raise UserError(f"pairs {folder}: {state}; build them with: {build_command}")
    with as_written(folder / "manifest.json", f"remove it and run: {build_command}"):
        manifest = json.loads((folder / "manifest.json").read_text())
        entries = [
            (folder / entry["file"], entry["sha256"])
            for split in manifest["splits"].values()
            for entry in split["shards"]
        ]
        for value in (manifest["schema"], manifest["made_from"], *manifest["splits"].values()):
            if not isinstance(value, dict):
                raise TypeError(f"{value!r} is no object")
        for name, split in manifest["splits"].items():
            tuple(split["latent"])
            if sum(entry["records"] for entry in split["shards"]) != split["records"]:
                raise ValueError(f"its shards of {name} have not its {split['records']} records")
        roles = {name.partition("_")[0] for name in manifest["splits"]}
        if roles != {"train", "heldout"}:
            raise ValueError(f"its splits are of {', '.join(sorted(roles)) or 'nothing'}, not of train and heldout")
    for path, digest in entries:
        if not is_whole(path):
            raise UserError(f"pair shard {path}: is missing; make it again with: {build_command}")
        if index.hash(path) != digest:
            raise UserError(f"pair shard {path}: truncated or altered (its hash is not the manifest's); "
                            f"remove it and run: {build_command}")  # fmt: skip
    return manifest


def build_command(stage: str, workdir: Path) -> str:
    """What to type to build a stage's pairs."""
    return stage_command("pairs", stage, workdir)


def open_stage(workdir: Path, stage: str, index: Index | None = None) -> Pairs:
    """The finished shards of a stage; see :func:`open_pairs`."""
    return open_pairs(workdir / stage / "pairs", build_command(stage, workdir), index)


def open_stages(workdir: Path, stages: Sequence[str], index: Index | None = None) -> Pairs:
    """The finished pairs of one stage, or those of several as one.

    Raises:
        UserError: see :func:`open_pairs`; the stages have other bases, resolutions or latents.
    """
    parts = [open_stage(workdir, stage, index) for stage in stages]
    return parts[0] if len(parts) == 1 else _joined(workdir, parts)


def _joined(workdir: Path, parts: Sequence[Pairs]) -> Pairs:
    """All records of a resolution become one source, so that each batch has pairs of all stages. Files are named from
    the run's folder."""
    first = parts[0]
    for part in parts[1:]:
        _require_alike(first, part)
    splits: dict[str, Any] = {}
    records: dict[str, list[RecordSource]] = {}
    for part in parts:
        opened = {role: iter(found) for role, found in part.sources.items()}
        for name, split in part.manifest["splits"].items():
            files = [e | {"file": str((part.folder / e["file"]).relative_to(workdir))} for e in split["shards"]]
            whole = splits.setdefault(name, split | {"records": 0, "shards": []})
            whole |= {"records": whole["records"] + split["records"], "shards": [*whole["shards"], *files]}
            records.setdefault(name, []).append(next(opened[name.partition("_")[0]]))
    sources: dict[str, list[RecordSource]] = {}
    for name, found in records.items():
        sources.setdefault(name.partition("_")[0], []).append(Joined(found, mixed=name.startswith("heldout_")))
    common = {key: value for key, value in first.manifest["made_from"].items()
              if all(part.manifest["made_from"].get(key) == value for part in parts)}  # fmt: skip
    manifest = first.manifest | {"splits": splits, "made_from": common}
    return Pairs(workdir, manifest, sources, json_hash([part.hash for part in parts]))


def _require_alike(one: Pairs, other: Pairs) -> None:
    """Raises UserError where the pairs of two stages cannot be learnt from together."""
    same = ("data.resolutions", content_key("model.base"))
    found, wanted = ({key: pairs.manifest["made_from"].get(key) for key in same} for pairs in (other, one))
    require_same(found, wanted, f"pairs {other.folder}", f"as {one.folder}, beside which they are to be learnt from")
    if one.manifest["schema"] != other.manifest["schema"]:
        raise UserError(f"pairs {other.folder}: their records have other fields than those of {one.folder}; they "
                        "cannot be learnt from together")  # fmt: skip


class Joined:
    """The records of several sources.

    Args:
        sources: one after the other.
        mixed: they take turns, in proportion to their sizes: what looks at the first records sees all of them.
    """

    def __init__(self, sources: Sequence[RecordSource], mixed: bool = False) -> None:
        self._sources, sizes = sources, [len(source) for source in sources]
        number, row = np.repeat(np.arange(len(sizes)), sizes), np.concatenate([np.arange(size) for size in sizes])
        turns = np.argsort((row + 0.5) / np.array(sizes)[number], kind="stable") if mixed else np.arange(sum(sizes))
        self._places = np.stack([number, row], axis=1)[turns]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, i: int) -> Record:
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        number, row = self._places[i].tolist()
        return self._sources[number][row]
