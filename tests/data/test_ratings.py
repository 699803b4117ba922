"""Pairs as people rated them: what is dropped, what is swapped, and what the rest of a run sees of it."""

import json
from pathlib import Path

import numpy as np
import pytest

from hgdpo_jax.data import ratings as kept_ratings
from hgdpo_jax.data.pairs import Pairs, open_stage
from hgdpo_jax.data.ratings import NAME, Ratings, pair_hash, read_exported
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import write_json
from tests import tiny

BETTER = {"train0-0": "winner", "train0-1": "loser", "train0-2": "equal", "train1-1": "neither", "heldout0-0": "loser"}


@pytest.fixture
def built(tmp_path: Path) -> Pairs:
    """Six pairs to train on, in two shards, and two held out."""
    tiny.write_pairs(tmp_path / "stage1" / "pairs", train=6, heldout=2)
    return open_stage(tmp_path, "stage1")


def rate(built: Pairs, better: dict[str, str]) -> Pairs:
    """The same pairs, opened where these ratings are kept beside them."""
    write_json(built.folder / NAME, kept_ratings.kept(Ratings(better), built.hash))
    return open_stage(built.folder.parent.parent, "stage1")


def test_rated_pairs_are_left_out_or_change_places(built: Pairs) -> None:
    before, rated = built.by_id("train"), rate(built, BETTER)
    after = rated.by_id("train")
    assert list(after) == ["train0-0", "train0-1", "train1-0", "train1-2"]
    for name in ("train0-0", "train1-0", "train1-2"):
        assert all(np.array_equal(after[name][key], value) for key, value in before[name].items())
    was, now = before["train0-1"], after["train0-1"]
    assert np.array_equal(now["winner"], was["loser"]) and np.array_equal(now["loser"], was["winner"])
    assert (now["winner_score"], now["loser_score"]) == (was["loser_score"], was["winner_score"]) == (0, 1)
    assert now["winner_number"] == -1 and now["caption"] == was["caption"]
    (source,) = rated.sources["train"]
    assert [source[i]["id"].decode() for i in range(len(source))] == list(after)
    with pytest.raises(IndexError):
        source[4]
    held, was = rated.sources["heldout"][0][0], built.by_id("heldout")["heldout0-0"]
    assert np.array_equal(held["winner"], was["loser"])


def test_the_manifest_counts_what_is_left_shard_by_shard(built: Pairs) -> None:
    """By these counts the reference's predictions find their records."""
    dropped = dict.fromkeys(("train0-0", "train0-1", "train0-2", "train1-1"), "neither")
    rated = rate(built, dropped)
    split = rated.manifest["splits"]["train_32x32"]
    assert split["records"] == 2 and [(e["file"][-14:], e["records"]) for e in split["shards"]] == [
        ("00001-of-00002", 2)
    ]
    assert list(rated.by_id("train")) == ["train1-0", "train1-2"]
    everything = rate(built, {f"train{i}-{n}": "equal" for i in range(2) for n in range(3)})
    assert list(everything.sources) == ["heldout"] and list(everything.manifest["splits"]) == ["heldout_32x32"]


def test_what_depends_on_pairs_depends_on_what_ratings_change(built: Pairs) -> None:
    plain = built.hash
    hashes = [
        rate(built, better).hash for better in ({"train0-0": "loser"}, {"train0-0": "equal"}, {"train0-1": "loser"})
    ]
    assert len({plain, *hashes}) == 4
    assert rate(built, {"train0-0": "neither"}).hash == hashes[1]  # for whichever reason it is left out
    confirmed = rate(built, {"train0-0": "winner"})
    assert confirmed.hash == plain and str(confirmed.ratings).endswith("0 swapped, 1 confirmed")


@pytest.mark.parametrize(
    "content, reason",
    [
        ("{", "JSONDecodeError"),
        ('{"manifest": "0", "better": {}}', "it rates other shards than are there now"),
        ('{"better": {}}', "KeyError: 'manifest'"),
        ('{"manifest": "HASH", "better": {"train0-0": "left"}}', "KeyError: 'left'"),
        ('{"manifest": "HASH", "better": ["train0-0"]}', "AttributeError"),
    ],
)
def test_damaged_ratings_are_named(built: Pairs, content: str, reason: str) -> None:
    (built.folder / NAME).write_text(content.replace("HASH", built.hash))
    with pytest.raises(UserError, match=f"ratings.json: is not as it was written .*{reason}.*; remove it, and give"):
        open_stage(built.folder.parent.parent, "stage1")


def test_a_rating_of_what_is_no_pair_is_refused(built: Pairs) -> None:
    with pytest.raises(
        UserError, match="ratings.json: rates train0-9, which is no pair there; remove it, and give the"
    ):
        rate(built, {"train0-9": "equal"})


def test_a_pair_is_told_by_both_its_latents() -> None:
    one = tiny.record("a", np.random.default_rng(0))
    swapped = one | {"winner": one["loser"], "loser": one["winner"]}
    assert pair_hash(one) == pair_hash(one | {"id": "b", "winner_score": 3.0}) != pair_hash(swapped)
    other = one["loser"].copy()
    other[0, 0, 0] += 1
    assert pair_hash(one | {"loser": other}) != pair_hash(one)


def test_an_exported_file_is_read_by_stage(tmp_path: Path) -> None:
    rated = {"a": {"pair": "0" * 16, "better": "equal"}}
    path = tmp_path / "ratings.json"
    path.write_text(json.dumps({"hgdpo_jax": "ratings", "stages": {"stage1": rated, "stage2": {}}}))
    assert [read_exported(path, stage) for stage in ("stage1", "stage2", "stage3")] == [rated, {}, None]
    for wrong in ("[]", '{"hgdpo_jax": "answers", "stages": {}}', '{"hgdpo_jax": "ratings"}', "\xff",
                  json.dumps({"hgdpo_jax": "ratings", "stages": {"stage1": {"a": {"pair": "0", "better": "left"}}}}),
                  json.dumps({"hgdpo_jax": "ratings", "stages": {"stage1": {"a": {"better": "equal"}}}})):  # fmt: skip
        path.write_bytes(wrong.encode("latin-1"))
        with pytest.raises(UserError, match="ratings.json: is not as it was written .*; export one on the page of"):
            read_exported(path, "stage1")
    with pytest.raises(UserError, match="no such file; export one on the page of python -m hgdpo_jax.browse"):
        read_exported(tmp_path, "stage1")
