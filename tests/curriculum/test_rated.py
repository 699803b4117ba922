"""Pairs that people rated: from the file that the page exports to the losers of the stage that follows."""

import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from hgdpo_jax.curriculum import build
from hgdpo_jax.curriculum.winners import Group
from hgdpo_jax.data.built import list_shards, read_shard
from hgdpo_jax.data.pairs import open_stage
from hgdpo_jax.data.photographs import list_photographs
from hgdpo_jax.data.ratings import NAME, pair_hash
from hgdpo_jax.data.record import Record
from hgdpo_jax.run.errors import UserError
from tests import tiny

Make = Callable[..., ConfigDict]


class Noise:
    """Winners and losers that are noise, a photograph's own; an earlier stage's winner loses."""

    def __init__(self) -> None:
        self.seen: dict[str, Record] = {}  # records of the earlier stage

    def begin(self, group: Group) -> Callable[[], list[Record]]:
        earlier: list[Record | None] = [*group.earlier] or [None] * len(group.photographs)
        records = []
        for i, (photograph, before) in enumerate(zip(group.photographs, earlier, strict=True)):
            rng = np.random.default_rng(zlib.crc32(photograph.id.encode()))
            winner, loser = rng.standard_normal((2, *tiny.LATENT)).astype(np.float16)
            if before:
                self.seen[photograph.id], loser = before, before["winner"]
            records.append(group.record(i, winner, 1.5, 2, loser=loser, loser_score=np.float32(0.5)))
        return lambda: records


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> Noise:
    winners = Noise()
    monkeypatch.setattr(build, "winners_of", lambda *_: winners)
    return winners


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny.write_scorer(folder / "scorer")
    tiny.write_photographs(folder / "photographs", train=4, heldout=2)
    return folder


@pytest.fixture
def make(one_level: Path, inputs: Path) -> Make:
    def make_config(stage: str, ratings: Path | str = "", **pairs: object) -> ConfigDict:
        config = tiny.config(one_level, stage)
        config.data.photographs = str(inputs / "photographs")
        config.pairs.update(scorer=str(inputs / "scorer"), batch=8, shard_size=2, ratings=str(ratings), **pairs)
        return config

    return make_config


def exported(workdir: Path, path: Path, better: dict[str, str], stage: str = "stage1", **changed: Any) -> Path:
    """The file that the page exports where the first of these pairs, and the others, are rated so."""
    records = {**open_stage(workdir, stage).by_id("train"), **open_stage(workdir, stage).by_id("heldout")}
    rated = {name: {"pair": pair_hash(records[name]), "better": word} | changed for name, word in better.items()}
    path.write_text(json.dumps({"hgdpo_jax": "ratings", "stages": {stage: rated}}))
    return path


def test_ratings_decide_what_a_stage_and_the_next_learn_from(
    make: Make, inputs: Path, noise: Noise, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder, there = tmp_path / "stage1" / "pairs", list[int]()
    count = lambda: there.append(sum(len(read_shard(shard).records) for shard in list_shards(folder)))  # noqa: E731
    build.build(make("stage1"), tmp_path, count)
    assert there == [2, 4, 6]  # whoever looks meanwhile is told whenever there are more
    before = open_stage(tmp_path, "stage1")
    shards = {path.name: path.read_bytes() for path in before.folder.glob("*array_record*")}
    first, second, third, fourth = list(before.by_id("train"))
    was = dict(before.by_id("train"))
    better = {first: "loser", second: "equal", third: "neither", fourth: "winner"}
    path = exported(tmp_path, tmp_path / "ratings of mine.json", better)
    capsys.readouterr()
    build.build(make("stage1", path), tmp_path)
    line = "4 pairs were rated by hand: 1 dropped, 1 dropped as equal, 1 swapped, 1 confirmed"
    assert line in capsys.readouterr().out
    rated = open_stage(tmp_path, "stage1")
    assert list(rated.by_id("train")) == [first, fourth] and rated.hash != before.hash
    assert np.array_equal(rated.by_id("train")[first]["winner"], was[first]["loser"])
    assert {path.name: path.read_bytes() for path in before.folder.glob("*array_record*")} == shards
    reasons = json.loads((before.folder / "without_pair.json").read_text())
    assert reasons == {second: "its pictures were rated equal", third: "it was dropped by hand"}

    build.build(make("stage1"), tmp_path)  # they stay without being given again, and it says so
    assert line in capsys.readouterr().out and open_stage(tmp_path, "stage1").hash == rated.hash
    build.build(make("stage2", path, winner="sdrecon", loser="stage1"), tmp_path)
    assert f"config key pairs.ratings={path}: rates no pair of stage2" in capsys.readouterr().out
    assert list(open_stage(tmp_path, "stage2").by_id("train")) == [first, fourth]
    assert np.array_equal(noise.seen[first]["winner"], was[first]["loser"])
    assert (noise.seen[first]["winner_score"], noise.seen[first]["loser_score"]) == (0.5, 1.5)
    (before.folder / NAME).unlink()
    with pytest.raises(UserError, match="content of the pairs of stage1=sha256 .*stage2/pairs was made with sha256"):
        build.build(make("stage2", winner="sdrecon", loser="stage1"), tmp_path)


@pytest.mark.parametrize(
    "damage, line",
    [
        (lambda path: path.unlink(), "no such file; export one on the page of"),
        (lambda path: path.write_text("{}"), "ratings.json: is not as it was written .*hgdpo_jax.*; export one"),
        (lambda path: rename(path, "1.jpg"), "rates a pair of 1.jpg, of which stage1 has none; give the file that"),
    ],
)
def test_a_file_that_cannot_be_of_these_pairs_is_refused_before_any_is_built(
    make: Make, noise: Noise, tmp_path: Path, damage: Callable[[Path], Any], line: str
) -> None:
    build.build(make("stage1"), tmp_path / "other")
    name = next(iter(open_stage(tmp_path / "other", "stage1").by_id("train")))
    path = exported(tmp_path / "other", tmp_path / "ratings.json", {name: "loser"})
    damage(path)
    with pytest.raises(UserError, match=f"config key pairs.ratings={path}: .*{line}") as error:
        build.build(make("stage1", path), tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run" / "stage1").exists()


def rename(path: Path, name: str) -> None:
    content = json.loads(path.read_text())
    content["stages"]["stage1"] = {name: {"pair": "0" * 16, "better": "loser"}}
    path.write_text(json.dumps(content))


def test_a_file_of_other_pairs_changes_nothing(make: Make, inputs: Path, noise: Noise, tmp_path: Path) -> None:
    build.build(make("stage1"), tmp_path)
    pairs = open_stage(tmp_path, "stage1")
    name, *others = pairs.by_id("train")
    held = dict.fromkeys(pairs.by_id("heldout"), "neither")
    path = tmp_path / "ratings.json"
    lines = {
        f"rates another pair of {name} than is in .*stage1/pairs; give the file that the page of this run exports":
            lambda: exported(tmp_path, path, {others[0]: "loser", name: "loser"}, pair="0" * 16),
        "leaves no pair of split heldout; keep one": lambda: exported(tmp_path, path, {name: "loser"} | held),
    }  # fmt: skip
    for line, write in lines.items():
        write()
        with pytest.raises(UserError, match=f"config key pairs.ratings={re.escape(str(path))}: {line}"):
            build.build(make("stage1", path), tmp_path)
        assert not (pairs.folder / NAME).exists() and open_stage(tmp_path, "stage1").hash == pairs.hash


def test_a_photograph_without_a_pair_cannot_be_rated(make: Make, inputs: Path, noise: Noise, tmp_path: Path) -> None:
    build.build(make("stage1"), tmp_path)
    name, other, *_ = open_stage(tmp_path, "stage1").by_id("train")
    build.build(make("stage1", exported(tmp_path, tmp_path / "first.json", {other: "neither"})), tmp_path)
    build.build(make("stage2", winner="sdrecon", loser="stage1"), tmp_path)
    path = exported(tmp_path, tmp_path / "second.json", {name: "loser"}, "stage2")
    content = json.loads(path.read_text())
    content["stages"]["stage2"][other] = {"pair": "0" * 16, "better": "loser"}
    path.write_text(json.dumps(content))
    listed = {photograph.id for photograph in list_photographs(inputs / "photographs", "train")}
    assert other in listed
    with pytest.raises(UserError, match=f"rates a pair of {other}, of which stage2 has none; give the file"):
        build.build(make("stage2", path, winner="sdrecon", loser="stage1"), tmp_path)
