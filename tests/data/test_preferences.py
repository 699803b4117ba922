"""Given pairs of each form, and a run of one stage on them without a scorer."""

import csv
import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hgdpo_jax.curriculum import build
from hgdpo_jax.data.pairs import open_stage
from hgdpo_jax.data.photographs import list_photographs
from hgdpo_jax.data.pixels import load_images, load_losers
from hgdpo_jax.diffusion import pipeline as pipelines
from hgdpo_jax.diffusion.sampler import Sampler
from hgdpo_jax.results import images
from hgdpo_jax.results.evaluation import evaluate
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.index import Index
from hgdpo_jax.run.settings import load_config, validate
from hgdpo_jax.scoring import judges
from hgdpo_jax.training import loop
from tests import tiny
from tests.data.test_readers import CAPTIONS, colour, png, write_images
from tests.results.test_exported import at_once

WON = {"a": "b", "b": "c"}  # over whom


def jsonl(folder: Path) -> Path:
    names = {w: {"winner": f"{w}.png", "loser": f"{x}.png"} for w, x in WON.items()}
    lines = [{"caption": CAPTIONS[w], "split": "train", **files} for w, files in names.items()]
    lines.append({"caption": "x", "winner": "c.png", "loser": "a.png", "split": "heldout"})
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8-sig")
    return folder / "pairs.jsonl"


def pick_a_pic(folder: Path) -> Path:
    rows = [("a", "b", 1.0, True), ("c", "b", 0.0, True), ("a", "c", 0.5, True), ("a", "c", 1.0, False)]
    columns = {
        "jpg_0": [png(x) for x, *_ in rows],
        "jpg_1": [png(y) for _, y, *_ in rows],
        "label_0": [label for *_, label, _ in rows],
        "has_label": [labelled for *_, labelled in rows],
        "caption": [CAPTIONS["a"], CAPTIONS["b"], "tie", "none"],
    }
    (folder / "data").mkdir()
    pq.write_table(pa.table(columns), folder / "data" / "train-00000-of-00001.parquet", row_group_size=3)
    held = {key: values[:1] for key, values in columns.items()}
    pq.write_table(pa.table(held), folder / "data" / "validation_unique-00000-of-00001.parquet")
    return folder


def hpd(folder: Path) -> Path:
    entries = [{"prompt": CAPTIONS[w], "path1": f"{w}.png", "path2": f"{x}.png", "model1": "real_images"}
               for w, x in WON.items()]  # fmt: skip
    (folder / "train.json").write_text(json.dumps(entries))
    return folder / "train.json"


def real_align(folder: Path) -> Path:
    with (folder / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "prompt", "real_image_path", "fake_image_path"])
        rows.writerows([i, CAPTIONS[w], f"{w}.png", f"{x}.png"] for i, (w, x) in enumerate(WON.items()))
    return folder / "pairs.csv"


@pytest.mark.parametrize("write", [jsonl, pick_a_pic, hpd, real_align])
def test_each_form_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture, write: Callable[[Path], Path]) -> None:
    write_images(tmp_path, *"abc")
    place = write(tmp_path)
    with caplog.at_level(logging.WARNING):
        found = list_photographs(place, "train", heldout=0.0, given=True)
    assert [p.caption for p in found] == [CAPTIONS[w] for w in WON]
    readable, winners, losers = load_losers(*load_images(found, (8, 12)))
    assert [p.id for p in readable] == [p.id for p in found]
    for cut, names in ((winners, WON), (losers, WON.values())):
        expected = np.array([colour(name) for name in names], np.float32)[:, None, None] / 127.5 - 1.0
        assert np.array_equal(cut, np.broadcast_to(expected, cut.shape))
    if write is pick_a_pic:
        assert "pairs: 1 ties and 1 without a label or caption dropped" in caplog.text
    if write in (jsonl, pick_a_pic):
        assert len(list_photographs(place, "heldout", given=True)) == 1


def test_both_pictures_are_cut_by_the_winners_shape_and_a_broken_loser_leaves_its_pair_out(tmp_path: Path) -> None:
    Image.new("RGB", (10, 30), "red").save(tmp_path / "tall.png")
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    lines = [{"caption": "x", "winner": "tall.png", "loser": loser} for loser in ("wide.png", "broken.png", "gone.png")]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = list_photographs(tmp_path / "pairs.jsonl", "train", heldout=0.0, mirror=True, given=True)
    kept, winners, losers = load_losers(*load_images(found, (12, 4)))
    assert [p.id for p in kept] == ["tall.png", "tall.png#mirrored"] and winners.shape == losers.shape == (2, 12, 4, 3)
    assert np.array_equal(losers, np.ones_like(losers))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"caption": "x", "winner": "a.png"}', "line 1: expects"),
        ("a.jsonl", b'{"caption": "x", "winner": "a", "loser": "b", "split": "dev"}', "split 'dev' is not one of"),
        ("a.json", b'{"prompt": "x"}', "expects a list of"),
        ("a.json", b'[{"prompt": "x", "path1": "a.png"}]', "entry 1 has not prompt, path1, path2"),
        ("a.csv", b"prompt,real\nx,y", "has columns prompt, real; expects prompt, real_image_path"),
        ("a.parquet", b"PAR1", "is not a parquet file that can be read"),
        ("a.txt", b"x", r"expects \.jsonl, Pick-a-Pic's \.parquet"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        list_photographs(tmp_path / name, "train", given=True)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("label", [2, -1, 0.7, "1", [1], b"0"])
def test_a_label_that_says_neither_is_refused(tmp_path: Path, label: object) -> None:
    columns = {"jpg_0": [png("a")] * 2, "jpg_1": [png("b")] * 2, "caption": ["x"] * 2}
    labels = [label, {str: "0", list: [0], bytes: b"0"}.get(type(label), 0)]
    pq.write_table(pa.table(columns | {"label_0": labels}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet row 0 of group 0: label_0 is .*; expects 1, 0, or 0\.5 for a tie"):
        list_photographs(tmp_path / "a.parquet", "train", given=True)


def test_labels_that_are_missing_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    columns = {
        "jpg_0": [png("a")] * 5,
        "jpg_1": [png("b")] * 5,
        "caption": ["one", "x", "x", None, "two"],
        "label_0": [1.0, None, float("nan"), 1.0, 0.0],
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    (tmp_path / "._a.parquet").write_bytes(b"x")
    with caplog.at_level(logging.WARNING):
        found = list_photographs(tmp_path, "train", heldout=0.0, given=True)
    assert [p.caption for p in found] == ["one", "two"]
    assert "pairs: 3 without a label or caption dropped" in caplog.text


def test_pairs_are_given_whole() -> None:
    with pytest.raises(UserError, match="pairs are given whole; expects given for both or for neither"):
        load_config("configs/given.py:sd15", ["pairs.loser=pool"])


class Glance:
    """In place of the judges: what can be seen without a network."""

    def __init__(self, scorer: str, second: str, third: str, more: str, mesh: object) -> None:
        assert scorer == second == third == more == ""

    def __call__(self, images: np.ndarray, input_ids: np.ndarray) -> dict[str, np.ndarray]:
        images = np.asarray(images)
        means = images.mean((1, 2))
        one = {name: means[:, 0] for name in ("face_found", "face_score", "sharpness")}
        return one | {"face_embedding": means, "hue": means[:, :2]}


def test_one_stage_runs_on_given_pairs_from_building_to_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps and the judges' networks are left out: they are those of every stage."""
    monkeypatch.setattr(judges, "VIEWS", 2)
    monkeypatch.setattr(loop, "_run", at_once)
    monkeypatch.setattr("hgdpo_jax.results.evaluation.Judges", Glance)
    base, folder, workdir = tiny.write_base(tmp_path / "base"), tmp_path / "photographs", tmp_path / "run"
    listing = (tiny.write_photographs(folder, train=9, heldout=0) / "captions.jsonl").read_text()
    photographs = [json.loads(line)["file"] for line in listing.splitlines()]
    lines = [{"caption": f"person {i}", "winner": photographs[i], "loser": photographs[(i + 1) % 9],
              "split": "heldout" if i > 5 else "train"} for i in range(9)]  # fmt: skip
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = tiny.config(base, "given", steps=1)
    config.data.pairs = str(folder / "pairs.jsonl")
    config.pairs.update(winner="given", loser="given", batch=8, shard_size=9)
    validate(config)
    build.build(config, workdir)
    record = open_stage(workdir, "given").by_id("train")[photographs[0]]
    pipeline = pipelines.load_pipeline(base)
    sampler = Sampler(pipeline, tiny.mesh(), solver="ddim", steps=2, guidance=1.0, batch=8, seed=0)
    listed = list_photographs(config.data.pairs, "train", index=Index(), given=True)[:1]
    _, *pixels_of = load_losers(*load_images(listed, (32, 32)))
    for role, pixels in zip(("winner", "loser"), pixels_of, strict=True):
        expected = sampler.encode(pixels, "")[0]
        # Of another number of devices, so another program: the last bit of float16, below 2.
        assert np.abs(record[role] - expected).max() <= 2**-10 < np.abs(expected).max() < 2
    loop.train(config, workdir)
    found = evaluate(config, workdir)
    assert list(found["models"]) == ["base", "given"] and found["people"] == 3
    assert "preference_score" not in found["models"]["given"] and "faces_found" in found["models"]["given"]
    assert images.from_run(workdir, None, 0.5, None, True).settings["stage"] == "given"
