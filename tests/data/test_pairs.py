"""Shards: TFDS opens them, damage is named, nothing is overwritten."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from hgdpo_jax.data import shards
from hgdpo_jax.data.pairs import RecordsById, open_stage, open_stages
from hgdpo_jax.data.record import Record, features
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.training.reference_cache import _shards
from tests import tiny


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    tiny.write_pairs(tmp_path / "stage1" / "pairs", train=6, heldout=2)
    return tmp_path


def test_tfds_opens_what_was_written(workdir: Path) -> None:
    source = tfds.builder_from_directory(str(workdir / "stage1" / "pairs")).as_data_source(split="train_32x32")
    rng = np.random.default_rng(0)
    expected = [tiny.record("", rng) for _ in range(6)]
    assert len(source) == 6
    for i, record in enumerate(expected):
        for name in ("winner", "loser", "input_ids"):
            assert np.array_equal(source[i][name], record[name])
            assert source[i][name].dtype == record[name].dtype
    found = open_stage(workdir, "stage1")
    for ours, theirs in zip(found.sources["train"][0], source, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert type(ours[name]) is type(value) and np.array_equal(ours[name], value)
            assert np.asarray(ours[name]).dtype == np.asarray(value).dtype and np.shape(ours[name]) == np.shape(value)
    by_id = found.by_id("train")
    assert list(by_id)[0] == "train0-0" and np.array_equal(by_id["train1-2"]["winner"], expected[5]["winner"])
    assert found.manifest["splits"]["train_32x32"]["records"] == 6


def test_whether_a_record_is_there_is_known_without_reading_any() -> None:
    class Unread:
        def __len__(self) -> int:
            return 2

        def __getitem__(self, i: int) -> Record:
            raise AssertionError("a record was read")

    found = RecordsById([Unread()], [["a", "b"]])
    assert "b" in found and "c" not in found and list(found) == ["a", "b"] and len(found) == 2


def test_features_of_a_concept_read_as_they_were_written(tmp_path: Path) -> None:
    folder, schema = tmp_path / "personalise" / "pairs", features(8, 77, loser=False, concept=(2, 3))
    rng = np.random.default_rng(0)
    record = {name: value for name, value in tiny.record("a", rng).items() if not name.startswith("loser")}
    record["concept"] = rng.standard_normal((2, 3)).astype(np.float16)
    shards.begin(folder, {})
    paths = {f"{role}_32x32": [shards.shard_path(folder, f"{role}_32x32", 0, 1)] for role in ("train", "heldout")}
    for (path,) in paths.values():
        shards.write_shard(path, schema, [record])
    shards.finish(folder, schema, paths, {"32x32": tiny.LATENT})
    found = open_stage(tmp_path, "personalise").sources["train"][0][0]
    assert found["concept"].dtype == np.float16 and np.array_equal(found["concept"], record["concept"])


def test_a_split_may_have_empty_shards_but_not_only_empty_ones(tmp_path: Path) -> None:
    folder, schema = tmp_path / "stage2" / "pairs", features(8, 77, loser=True)
    shards.begin(folder, {})
    name, latents = "train_32x32", {"32x32": tiny.LATENT}
    paths = {name: [shards.shard_path(folder, name, i, 2) for i in range(2)]}
    shards.write_shard(paths[name][0], schema, [])
    shards.write_shard(paths[name][1], schema, [])
    with pytest.raises(UserError, match="split train has no pair"):
        shards.finish(folder, schema, paths, latents)
    assert not list(folder.glob("pairs-*-of-00002")) and not (folder / "building.json").exists()  # for others
    shards.begin(folder, {})
    record, heldout = tiny.record("a", np.random.default_rng(0)), shards.shard_path(folder, "heldout_32x32", 0, 1)
    for path, records in ((paths[name][0], []), (paths[name][1], [record]), (heldout, [record])):
        shards.write_shard(path, schema, records)
    paths["heldout_32x32"] = [heldout]
    shards.finish(folder, schema, paths, latents)
    (source,) = open_stage(tmp_path, "stage2").sources["train"]
    assert len(source) == 1 and source[0]["id"] == b"a"


def test_missing_shards_name_the_command_that_builds_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"are missing; build them with: python -m hgdpo_jax.pairs --config configs/"):
        open_stage(tmp_path, "stage2")
    shards.begin(tmp_path / "stage2" / "pairs", {})
    with pytest.raises(UserError, match="are not finished"):
        open_stage(tmp_path, "stage2")


@pytest.mark.parametrize("damage", ["missing", "truncated", "altered"])
def test_a_damaged_shard_is_named(workdir: Path, damage: str) -> None:
    path = workdir / "stage1" / "pairs" / "pairs-train_32x32.array_record-00001-of-00002"
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(data[:-100])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    with pytest.raises(UserError, match=rf"{path}: (is missing|truncated or altered)"):
        open_stage(workdir, "stage1")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("manifest.json", "{", "manifest.json: is not as it was written"),
        ("manifest.json", '{"schema": {}, "made_from": {}, "splits": {"train_32x32": 3}}', "manifest.json: is not as"),
        ("manifest.json", '{"schema": {}, "made_from": {}, "splits": {"train_32x32": {"latent": [4, 4, 8], '
         '"records": 6, "shards": []}}}', "its shards of train_32x32 have not its 6 records"),
        ("manifest.json", '{"schema": {}, "made_from": [], "splits": {}}', "manifest.json: is not as .* no object"),
        ("manifest.json", '{"schema": {}, "made_from": {}, "splits": {}}', "its splits are of nothing, not of train"),
        ("manifest.json", "\\xff", "manifest.json: is not as it was written"),
        ("features.json", "{}", "TFDS cannot open them"),
        ("dataset_info.json", "", "TFDS cannot open them"),
        ("pairs-train_32x32.array_record-00000-of-00002.json", "[]", "00002.json: is not as it was written"),
        ("pairs-train_32x32.array_record-00000-of-00002.json", '{"sha256": "", "records": ["a"], "examples": []}',
         "its note names 1 records, the manifest 3"),
        ("pairs-train_32x32.array_record-00000-of-00002.json", '{"sha256": "", "records": [], "examples": [["a", 3]]}',
         "00002.json: is not as it was written .*: the content of a photograph is no hash"),
    ],
)  # fmt: skip
def test_what_is_damaged_beside_the_shards_is_named(workdir: Path, name: str, content: str, message: str) -> None:
    (workdir / "stage1" / "pairs" / name).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        open_stage(workdir, "stage1").by_id("train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"name": "pairs"', '"name": "../x"'),
        ('"{DATASET}', '"../{DATASET}'),
        ('"3", "3"', '"2", "4"'),
        ('["3", "3"]', '["6"]'),
        ('"3", "3"', '"3", "2"'),
    ],
)
def test_shards_that_tfds_would_look_for_elsewhere_are_refused(workdir: Path, old: str, new: str) -> None:
    path = workdir / "stage1" / "pairs" / "dataset_info.json"
    assert old in (content := json.dumps(json.loads(path.read_text())))
    path.write_text(content.replace(old, new))
    with pytest.raises(UserError, match=r"TFDS cannot open them .dataset_info.json has other files of \w+ than"):
        open_stage(workdir, "stage1")


def test_another_latent_shape_is_refused(workdir: Path) -> None:
    found = open_stage(workdir, "stage1")
    found.require({"32x32": tiny.LATENT, "64x32": (8, 4, 8)})
    with pytest.raises(UserError, match=r"latents of 32x32 are \(4, 4, 8\), this model's are \(8, 8, 8\)"):
        found.require({"32x32": (8, 8, 8)})
    with pytest.raises(UserError, match=r"were built for 32x32, data.resolutions of this config are 64x64"):
        found.require({"64x64": (8, 8, 8)})


def test_shards_of_another_config_are_not_overwritten(tmp_path: Path) -> None:
    made_from = {"seed": 1, "content of model.base": "a" * 64}
    assert not shards.begin(tmp_path, made_from)
    assert not shards.begin(tmp_path, made_from)
    with pytest.raises(UserError, match=f"content of model.base=sha256 b{{12}}…: {tmp_path} was made with sha256 a"):
        shards.begin(tmp_path, made_from | {"content of model.base": "b" * 64})
    with pytest.raises(UserError, match="config key seed=2: .* was made with 1; use that, or another --workdir"):
        shards.begin(tmp_path, made_from | {"seed": 2})


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_latent_that_is_not_finite_is_named(tmp_path: Path, value: float) -> None:
    record = tiny.record("photographs/7.jpg", np.random.default_rng(0))
    record["winner"][0, 0, 0] = value
    path = shards.shard_path(tmp_path, "train", 0, 1)
    with pytest.raises(UserError, match="winner of photographs/7.jpg: NaN or infinite"):
        shards.write_shard(path, features(8, 77, loser=True), [record])
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_noticed_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(UserError, match="free some disk space"):
        tiny.write_pairs(tmp_path)
    assert not list(tmp_path.glob("*.array_record*"))


def test_another_process_writes_the_same_bytes(workdir: Path, tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from tests import tiny; tiny.write_pairs(Path(sys.argv[1]), 6, 2)"
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "again")], env=environment, check=True)
    for path in (workdir / "stage1" / "pairs").glob("*.array_record*"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_pairs_of_several_stages_are_learnt_from_as_one(workdir: Path) -> None:
    tiny.write_pairs(workdir / "stage2" / "pairs", train=4, heldout=6)
    one, two = (open_stage(workdir, stage) for stage in ("stage1", "stage2"))
    joined = open_stages(workdir, ["stage1", "stage2"])
    for role, mixed in (("train", False), ("heldout", True)):
        (source,), (a,), (b,) = joined.sources[role], one.sources[role], two.sources[role]
        found = [bytes(record["winner"].tobytes()) for record in (source[i] for i in range(len(source)))]
        parts = [[bytes(records[i]["winner"].tobytes()) for i in range(len(records))] for records in (a, b)]
        if mixed:  # 2 and 6: whoever looks at the first sees both
            assert [part for value in found for part in (0, 1) if value == parts[part][0]][:2] == [1, 0]
            assert sorted(found) == sorted(parts[0] + parts[1])
        else:
            assert found == parts[0] + parts[1]
        with pytest.raises(IndexError):
            source[len(source)]
    split = joined.manifest["splits"]["train_32x32"]
    assert split["records"] == 10 == sum(entry["records"] for entry in split["shards"])
    assert all((workdir / entry["file"]).is_file() for entry in split["shards"])
    paths = [shard.path.name for shard in _shards(workdir / "cache", joined.manifest)]
    assert len(set(paths)) == 4 and paths[0].startswith("stage1.pairs.pairs-train")
    assert len({pairs.hash for pairs in (one, two, joined, open_stages(workdir, ["stage2", "stage1"]))}) == 4
    assert open_stages(workdir, ["stage1"]).hash == one.hash
    joined.require({"32x32": tiny.LATENT})


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("content of model.base", r"content of model\.base=sha256 .*…: pairs .*stage2/pairs was made with sha256"),
        ("data.resolutions", r"config key data\.resolutions=\['a'\]: pairs .*stage2/pairs was made with \['b'\]"),
    ],
)
def test_pairs_of_another_base_resolution_or_kind_are_not_joined(workdir: Path, key: str, line: str) -> None:
    tiny.write_pairs(workdir / "stage2" / "pairs", train=4, heldout=2)
    for stage, value in (("stage1", "a"), ("stage2", "b")):
        path = workdir / stage / "pairs" / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["made_from"][key] = [value] if key == "data.resolutions" else value
        path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=line):
        open_stages(workdir, ["stage1", "stage2"])


def test_pairs_and_photographs_without_losers_are_not_joined(workdir: Path) -> None:
    folder, schema = workdir / "sft" / "pairs", features(tiny.LATENT[-1], 77, loser=False)
    assert not shards.begin(folder, {"test": 1})
    record = {name: value for name, value in tiny.record("a", np.random.default_rng(0)).items() if name in schema}
    paths = {f"{role}_32x32": [shards.shard_path(folder, f"{role}_32x32", 0, 1)] for role in ("train", "heldout")}
    for (path,) in paths.values():
        shards.write_shard(path, schema, [record])
    shards.finish(folder, schema, paths, {"32x32": tiny.LATENT})
    with pytest.raises(UserError, match="sft/pairs: their records have other fields than those of .*stage1/pairs"):
        open_stages(workdir, ["stage1", "sft"])
