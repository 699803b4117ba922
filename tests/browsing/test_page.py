"""The page of a run's pairs, as a parser reads it; tests/browser/pairs.py tries it in a browser."""

import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from hgdpo_jax import config as configuration
from hgdpo_jax import pairs
from hgdpo_jax.browsing import page, pictures
from hgdpo_jax.browsing.pictures import SIDE, SMALL, Decoder, thumbnail
from hgdpo_jax.browsing.reconstructions import Reconstructor
from hgdpo_jax.data import ratings, shards
from hgdpo_jax.data.photographs import list_photographs
from hgdpo_jax.data.pixels import load_images
from hgdpo_jax.data.record import LATENT, Record, features
from hgdpo_jax.data.shards import ShardPhotograph
from hgdpo_jax.devices.mesh import local_mesh
from hgdpo_jax.diffusion import pipeline as pipelines
from hgdpo_jax.diffusion.sampler import Sampler
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import file_hash, write_json
from hgdpo_jax.run.locks import lock
from tests import tiny

EVIL = "a \"woman\" & 'man' </script><script>alert(1)</script><!-- $data ${x}"
SCHEMA = features(tiny.LATENT[-1], 77, loser=True)
CONTENT = "content of model.base"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_photographs(tmp_path_factory.mktemp("inputs") / "photographs", train=4, heldout=2)


class Run:
    """A run whose pairs are random latents, with the functions that write parts of it."""

    def __init__(self, workdir: Path, base: Path, photographs: Path) -> None:
        self.workdir, self.base, self.photographs = workdir, base, photographs
        self.ids = {role: [p.id for p in list_photographs(photographs, role)] for role in ("train", "heldout")}
        self.made_from = {CONTENT: pipelines.base_hash(base), "seed": 0}

    def config(self, stage: str, **pairs: Any) -> ConfigDict:
        config = tiny.config(self.base, stage)
        config.data.photographs = str(self.photographs)
        config.pairs.update(pairs)
        return config

    def begin(self, stage: str, **pairs: Any) -> Path:
        """The folder of a stage's pairs, without any."""
        folder = self.workdir / stage / "pairs"
        shards.begin(folder, self.made_from)
        write_json(folder / "config.json", configuration.to_json(self.config(stage, **pairs)))
        return folder

    def records(self, ids: list[str], seed: int, losers: dict[str, np.ndarray] | None = None) -> list[Record]:
        rng, found = np.random.default_rng(seed), []
        for i, name in enumerate(ids):
            record = tiny.record(name, rng) | {"caption": f"caption of {name}", "winner_number": 4 + i}
            scores = {"winner_score": 0.25 * i, "loser_score": np.float32(-0.1)}
            found.append(record | scores | ({"loser": losers[name]} if losers else {}))
        return found

    def write(self, folder: Path, role: str, records: list[Record], examples: list[ShardPhotograph]) -> list[Path]:
        """One shard."""
        path = shards.shard_path(folder, f"{role}_32x32", 0, 1)
        shards.write_shard(path, SCHEMA, records, examples)
        return [path]

    def stage(self, stage: str, seed: int, losers: dict[str, np.ndarray] | None = None, **pairs: Any) -> list[Record]:
        """A finished stage; its records."""
        folder, written, every = self.begin(stage, **pairs), {}, []
        for role, ids in self.ids.items():
            records = self.records(ids, 2 * seed + (role == "heldout"), losers)
            examples = [ShardPhotograph(name, "0") for name in ids]
            written[f"{role}_32x32"] = self.write(folder, role, records, examples)
            every += records
        shards.finish(folder, SCHEMA, written, {"32x32": tiny.LATENT})
        return every

    def page(self) -> dict[str, Any]:
        """What the page holds, once it is written anew."""
        return held(page.PairsPage(self.workdir).write().read_text(encoding="utf-8"))

    def pictures(self) -> dict[str, int]:
        """Name → time at which it was written."""
        return {p.name: p.stat().st_mtime_ns for p in (self.workdir / "browse" / "pictures").iterdir()}


class Elements(HTMLParser):
    """Tags and attributes of a page, and the text in its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data


def held(text: str) -> dict[str, Any]:
    return json.loads(Elements(text).scripts[0])


@pytest.fixture
def run(tmp_path: Path, one_level: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(pictures, "_MOST", 1)  # several batches of the eight devices, the last not full
    return Run(tmp_path, one_level, photographs)


def test_every_pair_is_there_with_what_is_known_of_it(run: Run) -> None:
    easy = run.stage("stage1", 1)
    lost = {record["id"]: record["winner"] for record in easy}
    normal = run.stage("stage2", 2, lost, winner="sdrecon", loser="stage1", keep_if_winner_scores_higher=True)
    shown = run.page()["stages"]
    assert [(stage["name"], stage["title"], stage["finished"]) for stage in shown] == [
        ("stage1", "easy", True), ("stage2", "normal", True)
    ]  # fmt: skip
    for stage, records in zip(shown, (easy, normal), strict=True):
        rows = {row[0]: row for row in stage["rows"]}
        assert set(rows) == {*run.ids["train"], *run.ids["heldout"]}
        for record in records:
            name, caption, split, winner, loser, _, *rest, drawn = rows[record["id"]]
            assert caption == f"caption of {name}" and split.split("_") == [
                "heldout" if name in run.ids["heldout"] else "train", "32x32"
            ]  # fmt: skip
            scores = [pytest.approx(float(record[side]), rel=1e-4) for side in ("winner_score", "loser_score")]
            assert rest == [*scores, record["winner_number"], ratings.pair_hash(record), ""]
            assert winner != loser and drawn == []
    easy_winners = {row[0]: row[3] for row in shown[0]["rows"]}
    assert {row[0]: row[4] for row in shown[1]["rows"]} == easy_winners  # the same picture
    assert len(run.pictures()) == 6 * 3 + 6  # winners of both, losers of easy, photographs


def test_pictures_are_what_the_vae_makes_of_the_latents_and_photographs_as_they_were_cut(run: Run) -> None:
    records = {record["id"]: record for record in run.stage("stage1", 1)}
    rows = {row[0]: row for row in run.page()["stages"][0]["rows"]}
    folder, vae = run.workdir / "browse" / "pictures", pipelines.load_pipeline(run.base).vae
    for side, column in (("winner", 3), ("loser", 4)):
        latents = np.stack([records[name][side] for name in rows]).astype(np.float32)
        for name, image in zip(rows, np.asarray(vae.to_images(jnp.asarray(latents))), strict=True):
            found = np.asarray(Image.open(folder / rows[name][column]), np.float32)
            assert abs(found - (image + 1) * 127.5).max() <= 0.6  # rounded
    listed, images = load_images(list_photographs(run.photographs, "train", "heldout"), (32, 32))
    for photograph, image in zip(listed, images, strict=True):
        found = np.asarray(Image.open(folder / rows[photograph.id][5]), np.float32)
        np.testing.assert_array_equal(found, np.round((image + 1) * 127.5))


def test_reconstructions_are_drawn_again_once_and_stay(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.stage("stage2", 1, winner="sdrecon", strengths=(2, 5))
    (stage,) = held(page.PairsPage(run.workdir, reconstructions=True).write().read_text())["stages"]
    listed, images = load_images(list_photographs(run.photographs, "train", "heldout"), (32, 32))
    config, rows = run.config("stage2"), {row[0]: row for row in stage["rows"]}
    assert stage["strengths"] == [2, 5]
    sampler = Sampler.from_config(pipelines.load_pipeline(run.base), local_mesh(), config.pairs, config.seed)
    ids, names = sampler.tokenize([photograph.caption for photograph in listed]), [p.id for p in listed]
    for i, strength in enumerate((2, 5)):
        keys = sampler.keys("sdrecon", names, [strength] * len(names))
        latents = sampler.reconstruct(sampler.encode(images, ""), ids, keys, strength, "")
        for name, image in zip(names, sampler.decode(latents, ""), strict=True):
            found = np.asarray(Image.open(run.workdir / "browse" / "pictures" / rows[name][11][i]), np.float32)
            assert abs(found - (image + 1) * 127.5).max() <= 0.6  # rounded
    before = run.pictures()
    monkeypatch.setattr(Reconstructor, "__call__", None)  # nothing is drawn a second time
    assert held(page.PairsPage(run.workdir, reconstructions=True).write().read_text())["stages"] == [stage]
    assert run.page()["stages"] == [stage] and run.pictures() == before


def test_a_second_time_only_what_is_new_is_decoded(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    decode = Decoder.__call__

    def counted(decoder: Decoder, latents: Any, names: Any) -> Any:
        decoded.append(len(latents))
        return decode(decoder, latents, names)

    monkeypatch.setattr(Decoder, "__call__", counted)
    run.stage("stage1", 1)
    run.page()
    before, content = run.pictures(), (run.workdir / "browse" / "index.html").read_bytes()
    assert sum(decoded) == 2 * 6
    run.page()
    assert sum(decoded) == 2 * 6 and run.pictures() == before
    assert (run.workdir / "browse" / "index.html").read_bytes() == content
    folder = run.workdir / "stage1" / "pairs"
    for path in folder.glob("pairs-train*"):  # other pairs: the former's pictures go
        path.unlink()
    (folder / "manifest.json").unlink()
    run.stage("stage1", 3)
    run.page()
    assert sum(decoded) == 4 * 6 and len(run.pictures()) == len(before)
    assert len(run.pictures().keys() & before.keys()) == 6  # the photographs'
    assert not [path for path in (run.workdir / "browse").rglob("*") if path.name.startswith(".")]


def test_a_stage_that_is_being_built_shows_what_is_there(run: Run) -> None:
    folder, ids = run.begin("stage2", winner="sdrecon", keep_if_winner_scores_higher=True), run.ids["train"]
    path = shards.shard_path(folder, "train_32x32", 0, 1)
    records = run.records(ids, 1)
    examples = [ShardPhotograph(name, "0") for name in ids]
    examples[1] = examples[1]._replace(readable=False)
    groups = [shards.group_path(path, begin) for begin in (0, 2)]
    for begin, group in zip((0, 2), groups, strict=True):
        made = [record for record in records[begin : begin + 2] if record["id"] in (ids[0], ids[2])]
        shards.write_encoded(group, shards.encode(SCHEMA, made), examples[begin : begin + 2])
        with lock(folder):  # as the command that builds them has it
            (shown,) = run.page()["stages"]
        assert not shown["finished"] and [row[0] for row in shown["rows"]] == [ids[0], ids[2]][: begin // 2 + 1]
    assert shown["without"] == {
        "it is no picture that can be read": 1, "its winner scores lower than its loser": 1
    }  # fmt: skip
    assert shown["kept"] == pytest.approx(2 / 3)
    shards.join(path, groups)
    assert run.page()["stages"] == [shown]
    assert list((run.workdir / "stage2" / "pairs").glob("*ratings*")) == []


def test_groups_that_are_joined_while_they_are_read_are_read_as_a_shard(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hgdpo_jax.data import built

    folder, ids = run.begin("stage1"), run.ids["train"]
    path = shards.shard_path(folder, "train_32x32", 0, 1)
    groups = [shards.group_path(path, begin) for begin in (0, 2)]
    for begin, group in zip((0, 2), groups, strict=True):
        some = run.records(ids, 1)[begin : begin + 2]
        shards.write_encoded(group, shards.encode(SCHEMA, some), [ShardPhotograph(r["id"]) for r in some])
    reader = built.ArrayRecordReader

    def slow(name: str) -> Any:
        if name == str(groups[1]) and groups[1].is_file():
            monkeypatch.setattr(built, "ArrayRecordReader", reader)
            shards.join(path, groups)
        return reader(name)

    monkeypatch.setattr(built, "ArrayRecordReader", slow)
    assert [record["id"] for record in built.read_shard(path).records] == ids
    path.write_bytes(path.read_bytes()[:-70_000])
    with pytest.raises(UserError, match=f"pair shard {path}: cannot be read .*; remove it and run pairs again"):
        built.read_shard(path)


def test_the_page_keeps_up_with_pairs_and_does_not_stop_them(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = iter((0.0, 2.0, 19.0, 20.0, 20.0))  # a page that takes 2 s is due again 18 s later
    monkeypatch.setattr(page, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    shown, written = page.PairsPage(run.workdir), run.workdir / "browse" / "index.html"
    shown.keep_up()
    assert "no stage has a pair yet" in caplog.text and "pairs go on" in caplog.text
    run.stage("stage1", 1)
    shown.keep_up()
    assert not written.exists()
    shown.keep_up()
    assert len(held(written.read_text(encoding="utf-8"))["stages"][0]["rows"]) == 6 and not list(clock)


def test_a_stage_without_losers_has_no_page(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["--config", "configs/stage0_sft.py:portraits", "--workdir", str(run.workdir), "--browse"]
    monkeypatch.setattr("sys.argv", ["pairs", *command])
    with pytest.raises(UserError, match="--browse: stage0 has no losers, of which the page is; leave it out"):
        pairs.main()


def test_reasons_of_a_finished_stage_and_ratings_are_shown(run: Run) -> None:
    records = run.stage("stage1", 1)
    folder, first = run.workdir / "stage1" / "pairs", records[0]["id"]
    write_json(folder / "without_pair.json", {"gone": "its file is missing", first: "it was dropped by hand"})
    kept = ratings.kept(ratings.Ratings({first: "neither"}), file_hash(folder / "manifest.json"))
    write_json(folder / ratings.NAME, kept)
    (shown,) = run.page()["stages"]
    assert shown["without"] == {"its file is missing": 1}
    assert {row[0]: row[10] for row in shown["rows"]} == {r["id"]: "neither" * (r["id"] == first) for r in records}


def test_nothing_is_read_from_outside_and_captions_are_harmless(run: Run) -> None:
    folder = run.begin("stage1")
    ids = run.ids["train"]
    records = [record | {"caption": EVIL} for record in run.records(ids, 1)]
    run.write(folder, "train", records, [ShardPhotograph(name) for name in ids])
    text = page.PairsPage(run.workdir).write().read_text(encoding="utf-8")
    assert [row[1] for row in held(text)["stages"][0]["rows"]] == [EVIL] * len(ids)
    elements = Elements(text)
    assert len(elements.scripts) == 2 and [tag for tag, _ in elements.found].count("script") == 2
    code = elements.scripts[1]
    assert not re.search(r"https?:(?!//www\.w3\.org/2000/svg)|@import|fetch\(|XMLHttpRequest|innerHTML|eval\(", code)
    (policy,) = [has["content"] for tag, has in elements.found if tag == "meta" and "http-equiv" in has]
    assert policy and policy.startswith("default-src 'none'; img-src 'self' file: data:;")
    for _, has in elements.found:
        assert all((has.get(name) or "data:").startswith("data:") for name in ("src", "href", "srcset", "action"))


def test_photographs_that_are_gone_and_stages_without_losers_are_left_out(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run.stage("stage1", 1)
    run.begin("stage0", winner="photograph", loser="none")
    settings = run.workdir / "stage1" / "pairs" / "config.json"
    config = json.loads(settings.read_text())
    config["data"]["photographs"] = str(tmp_path / "unmounted")
    write_json(settings, config)
    (shown,) = run.page()["stages"]
    assert shown["name"] == "stage1" and {row[5] for row in shown["rows"]} == {""}
    assert (
        "unmounted: no such file or folder; set --config.data.photographs; the page of stage1 shows no" in caplog.text
    )


def test_what_cannot_be_shown_is_refused_in_one_line(run: Run, one_level: Path) -> None:
    with pytest.raises(UserError, match=f"{run.workdir}: no stage has a pair yet; run python -m hgdpo_jax.pairs first"):
        page.PairsPage(run.workdir).write()
    assert not (run.workdir / "browse").exists()
    folder = run.begin("stage1")
    settings = (folder / "config.json").read_text()
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="stage1/pairs: does not say with which settings it is built; run pairs again"):
        page.PairsPage(run.workdir).write()
    (run.workdir / "stage1" / "config.json").write_text(settings)  # of the training
    assert run.page()["stages"][0]["rows"] == []
    write_json(folder / "building.json", run.made_from | {CONTENT: "0" * 64})
    with pytest.raises(UserError, match=f"content of model.base=sha256 .*{folder} was made with sha256 0{{12}}…; use"):
        page.PairsPage(run.workdir).write()
    (folder / "building.json").write_text("[")
    with pytest.raises(UserError, match="building.json: is not as it was written"):
        page.PairsPage(run.workdir).write()
    with lock(run.workdir / "browse"), pytest.raises(UserError, match="browse: is being written by"):
        page.PairsPage(run.workdir).write()


def test_a_latent_that_decodes_to_nan_is_named(run: Run) -> None:
    decoder = Decoder(run.config("stage1"))
    latents = np.zeros((2, *tiny.LATENT), LATENT)
    latents[1] = np.nan
    with pytest.raises(UserError, match="winner of b: NaN or infinity"):
        list(decoder([*latents], ["winner of a", "winner of b"]))


@pytest.mark.parametrize(
    "side, kind, kept", [(SMALL, "PNG", SMALL), (SMALL + 1, "JPEG", SMALL + 1), (900, "JPEG", SIDE)]
)
def test_large_pictures_are_reduced(side: int, kind: str, kept: int, tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (side, side // 2, 3)).astype(np.uint8)
    path = tmp_path / "picture"
    path.write_bytes(thumbnail(image))
    opened = Image.open(path)
    assert opened.format == kind and opened.size == (kept // 2, kept)
    assert kind == "JPEG" or np.array_equal(np.asarray(opened), image)
    assert hashlib.sha256(thumbnail(image)).digest() == hashlib.sha256(path.read_bytes()).digest()
