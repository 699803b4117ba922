"""The three stages' pairs, built by the command on a tiny base and real photographs."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from hgdpo_jax.checking import disk
from hgdpo_jax.checking.check import check_pairs
from hgdpo_jax.curriculum import build
from hgdpo_jax.curriculum.candidates import Candidates, best, worst
from hgdpo_jax.curriculum.dry_run import dry_run, grouped, report
from hgdpo_jax.curriculum.plan import ShardPlan, plan_shards
from hgdpo_jax.curriculum.prepared import read_photographs
from hgdpo_jax.curriculum.store import FOLDER
from hgdpo_jax.curriculum.winners import Group, Pending, Pool, Reconstruction
from hgdpo_jax.data import shards
from hgdpo_jax.data.pairs import open_stage, open_stages
from hgdpo_jax.data.photographs import Photograph, choose_resolutions, list_photographs
from hgdpo_jax.data.pixels import load_images
from hgdpo_jax.data.record import features
from hgdpo_jax.devices.sharding import batch_sharding
from hgdpo_jax.diffusion import pipeline as pipelines
from hgdpo_jax.diffusion.sampler import Sampler
from hgdpo_jax.diffusion.source import open_source
from hgdpo_jax.models.clip import CLIPModel
from hgdpo_jax.models.convert import load_model, save_model
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import file_hash, write_json
from hgdpo_jax.run.folder import stage_config
from hgdpo_jax.run.index import Index
from hgdpo_jax.run.locks import lock
from hgdpo_jax.scoring.scorers import open_scorers
from hgdpo_jax.training import loop
from hgdpo_jax.training.loop import train
from tests import tiny
from tests.rounding import NETWORK, assert_close

Make = Callable[..., ConfigDict]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny.write_base(folder / "base", tiny.ONE_LEVEL)
    tiny.write_scorer(folder / "scorer", seed=6)  # which keeps some pairs of the normal stage, with a margin
    tiny.write_photographs(folder / "photographs", train=5, heldout=2)
    return folder


@pytest.fixture(scope="module")
def make(inputs: Path) -> Make:
    def make_config(stage: str, **settings: object) -> ConfigDict:
        config = tiny.config(inputs / "base", stage)
        config.data.photographs = str(inputs / "photographs")
        config.pairs.scorer = str(inputs / "scorer")
        config.pairs.update(pool_size=3, sampler="dpmpp_2m", steps=4, guidance=2.0, batch=8, shard_size=2)
        config.pairs.update(settings)
        return config

    return make_config


@pytest.fixture(scope="module")
def workdir(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All three stages."""
    folder = tmp_path_factory.mktemp("run")
    build.build(make("stage1"), folder)
    build.build(make("stage2", winner="sdrecon", loser="stage1", keep_if_winner_scores_higher=True), folder)
    build.build(make("stage3", winner="sdrecon", strengths=(1,), loser="stage2"), folder)
    return folder


def test_easy_pairs_are_the_best_and_the_worst_of_the_pool(workdir: Path, inputs: Path, make: Make) -> None:
    found = open_stage(workdir, "stage1").by_id("train")
    assert len(found) == 5
    # Draw the pool of one photograph again, alone: it depends on its id only.
    config, mesh = make("stage1"), tiny.mesh()
    pipeline = pipelines.load_pipeline(inputs / "base")
    sampler = Sampler(pipeline, mesh, solver="dpmpp_2m", steps=4, guidance=2.0, batch=3, seed=0)
    photograph = list_photographs(config.data.photographs, "train")[3]
    ids = np.repeat(pipeline.tokenize([photograph.caption]), 3, axis=0)
    latents = sampler.generate(ids, sampler.keys("pool", [photograph.id] * 3, [0, 1, 2]), (32, 32), "")
    (scorer,) = open_scorers(str(inputs / "scorer"), mesh)
    scores = np.asarray(scorer.score(jnp.asarray(sampler.decode(latents, "")), jnp.asarray(ids)))
    record = found[photograph.id]
    # Each of four steps adds the UNet's rounding, guidance 2 times that of one half of its batch and once the other's.
    drawn = 4 * 3 * NETWORK
    assert np.diff(np.sort(scores)).min() > 10 * drawn  # so that it is certain which is the best
    for role, i in (("winner", scores.argmax()), ("loser", scores.argmin())):
        assert_close(record[role], latents[i], 2**-11 + drawn)  # stored in float16
        assert record[f"{role}_score"] == pytest.approx(scores[i], abs=drawn)  # of cosines
    assert record["winner_number"] == scores.argmax() and record["caption"] == photograph.caption


def test_normal_pairs_pass_the_filter_and_take_the_easy_winner_as_loser(workdir: Path) -> None:
    easy, normal = (open_stage(workdir, stage).by_id("train") for stage in ("stage1", "stage2"))
    assert 0 < len(normal) <= len(easy)
    for name, record in normal.items():
        assert record["winner_score"] >= record["loser_score"]
        assert record["winner_number"] in (4, 5, 6, 7)
        assert np.array_equal(record["loser"], easy[name]["winner"])
        assert record["loser_score"] == easy[name]["winner_score"]


def test_hard_pairs_are_on_the_same_ids_against_the_normal_winner(workdir: Path, inputs: Path, make: Make) -> None:
    normal, hard = (open_stage(workdir, stage).by_id("train") for stage in ("stage2", "stage3"))
    assert list(hard) == list(normal)
    for name, record in hard.items():
        assert record["winner_number"] == 1
        assert np.array_equal(record["loser"], normal[name]["winner"])
    # t1 is almost the photograph: nearer to its own than to any other.
    pipeline = pipelines.load_pipeline(inputs / "base")
    _, images = load_images(list_photographs(make("stage1").data.photographs, "train"), (32, 32))
    encoded = np.asarray(pipeline.vae.to_latents(jnp.asarray(images)))
    names = [p.id for p in list_photographs(make("stage1").data.photographs, "train")]
    for name, record in hard.items():
        distance = np.abs(encoded - record["winner"].astype(np.float32)).mean((1, 2, 3))
        assert names[int(distance.argmin())] == name


def test_a_winner_that_scores_as_high_as_its_loser_is_in_k(make: Make) -> None:
    scores, earlier = np.array([[0.0, 2.0], [1.0, 1.0], [3.0, 0.5]], np.float32), np.array([2.5, 1.0, 1.0], np.float32)
    latents = np.arange(3 * 2 * 4, dtype=np.float32).reshape(3, 2, 1, 1, 4)

    class Fixed(Reconstruction):
        def candidates(self, group: Group) -> Pending:
            return lambda: Candidates(latents, scores, np.array([4, 5]))

    photographs = [Photograph(name, Path(), name) for name in "abc"]
    lost = [{"winner": np.full((1, 1, 4), i, np.float16), "winner_score": score} for i, score in enumerate(earlier)]
    group = Group(photographs, np.zeros((3, 77), np.int32), (8, 8), earlier=lost)
    settings = make("stage2", winner="sdrecon", loser="stage1", keep_if_winner_scores_higher=True).pairs
    fixed = object.__new__(Fixed)
    fixed.settings, fixed.scorers = settings, [None]
    records = fixed.begin(group)()
    assert [record["id"] for record in records] == ["b", "c"]  # a tie stays; the first of equals wins
    assert [record["winner_number"] for record in records] == [4, 4]
    assert [record["loser"].flat[0] for record in records] == [1, 2]
    assert np.array_equal(records[1]["winner"], latents[2, 0].astype(np.float16))


def test_pairs_are_the_same_where_candidates_are_kept_and_all_stages_draw_one_pool(
    workdir: Path, make: Make, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def made(stage: str, **settings: Any) -> tuple[int, int]:
        build.build(make(stage, keep_candidates=True, **settings), tmp_path)
        found = re.search(rf"{stage}/pairs: (\d+) candidates were made, (\d+) read from .*", capsys.readouterr().out)
        assert found
        return int(found[1]), int(found[2])

    assert made("stage1") == (21, 0)
    usual, easy = (open_stage(folder, "stage1") for folder in (workdir, tmp_path))
    assert usual.manifest["splits"] == easy.manifest["splits"]  # with the hashes of all shards
    assert made("small", pool_size=2) == (0, 14)
    for role in ("train", "heldout"):
        for record in open_stage(tmp_path, "small").by_id(role).values():
            assert record["winner_number"] in (0, 1) and record["winner_score"] >= record["loser_score"]
    # What is lost is made again: of two prompts or of one. Neighbours in rank, of Curriculum-DPO.
    next((tmp_path / FOLDER).glob("*.safetensors")).unlink()
    again = made("near", bucket=2, buckets=2)
    assert again in ((6, 15), (3, 18))
    joined = open_stages(tmp_path, ["stage1", "near"]).sources["train"][0]
    same = [np.array_equal(joined[i][side], joined[i + 5][side]) for i in range(5) for side in ("winner", "loser")]
    assert len(joined) == 10 and sum(same) == 5  # of three in a row one end stays


def test_candidates_are_what_is_drawn_decoded_and_scored_by_themselves(inputs: Path, make: Make) -> None:
    pipeline, mesh = pipelines.load_pipeline(inputs / "base"), tiny.mesh()
    sampler = Sampler(pipeline, mesh, solver="dpmpp_2m", steps=4, guidance=2.0, batch=2, seed=0)
    scorers, (photographs, images) = (
        open_scorers(str(inputs / "scorer"), mesh),
        load_images(list_photographs(inputs / "photographs", "train")[:3], (32, 32)),
    )
    names = [photograph.id for photograph in photographs]
    ids = pipeline.tokenize(names)
    keys, encoded = sampler.keys("sdrecon", names, [3] * 3), sampler.encode(images, "")
    latents = np.stack([encoded, sampler.reconstruct(encoded, ids, keys, 3, "")], axis=1)
    flat = latents.reshape(6, *latents.shape[2:])
    scores = sampler.measure_latents(flat, ids.repeat(2, axis=0), scorers[0].score, "").reshape(3, 2)
    settings = make("stage2", winner="sdrecon", strengths=(0, 3), loser="stage1").pairs
    group = Group(photographs, ids, (32, 32), images)
    found = Reconstruction(settings, sampler, scorers).candidates(group)()
    np.testing.assert_array_equal(found.latents, latents.astype(np.float16))
    np.testing.assert_array_equal(found.scores, scores)
    for choose, index in ((best, scores.argmax(1)), (worst, scores.argmin(1))):
        chosen = choose(found)
        np.testing.assert_array_equal(chosen.latents, found.latents[np.arange(3), index])
        np.testing.assert_array_equal(chosen.scores, scores[np.arange(3), index])
        np.testing.assert_array_equal(chosen.numbers, np.array([0, 3])[index])


def test_most_of_a_pool_is_dropped_early_and_the_rest_is_as_without(inputs: Path, make: Make) -> None:
    pipeline, mesh, size = pipelines.load_pipeline(inputs / "base"), tiny.mesh(), (32, 32)
    sampler = Sampler(pipeline, mesh, solver="dpmpp_2m", steps=4, guidance=2.0, batch=4, seed=0)
    photographs, scorers = (
        list_photographs(inputs / "photographs", "train")[:2],
        open_scorers(str(inputs / "scorer"), mesh),
    )
    group = Group(photographs, pipeline.tokenize([photograph.caption for photograph in photographs]), size)

    def pool(**settings: Any) -> Pool:
        return Pool(make("stage1", pool_size=5, **settings).pairs, sampler, scorers)

    whole, (ids, keys) = pool().candidates(group)(), pool()._inputs(group, range(5))
    state, _ = sampler.part_way(ids, keys, sampler.start(10, size), (0, 1), pool()._score, "")
    (_, predicted), scores = sampler.part_way(ids, keys, state, (1, 2), pool()._score, "")
    drawn = 4 * 3 * NETWORK  # as above
    np.testing.assert_allclose(scores, sampler.measure_latents(predicted, ids, pool()._score, ""), atol=drawn)
    drafts = sampler.drafts(ids, keys, size, 2, pool()._score, "")
    assert min(np.abs(early - whole.scores.ravel()).max() for early in (scores, drafts)) > 10 * drawn
    for settings, early in (({"race": 0.5}, scores), ({"draft_steps": 2}, drafts)):
        raced = pool(**settings, finalists=1)
        found, ranked = raced.candidates(group)(), early.reshape(2, 5)
        assert found.numbers.tolist() == [sorted((row.argmin(), row.argmax())) for row in ranked]
        expected = (np.stack([x[i, found.numbers[i]] for i in range(2)]) for x in (whole.latents, whole.scores))
        for part, other in zip(found[:2], expected, strict=True):
            assert_close(part, other, 2**-11 + drawn)
        (first, _), records = best(found).numbers, raced.begin(group)()
        assert records[0]["winner_number"] == first and records[0]["winner_score"] == found.scores[0].max()
        assert np.array_equal(records[0]["loser"], found.latents[0, found.scores[0].argmin()])


def test_guidance_outside_its_interval_is_none(inputs: Path) -> None:
    pipeline, settings = pipelines.load_pipeline(inputs / "base"), {"solver": "ddim", "steps": 4, "batch": 2, "seed": 0}
    ids = pipeline.tokenize(["a woman", "a man"])

    def drawn(sampler: Sampler) -> np.ndarray:
        return sampler.generate(ids, sampler.keys("pool", ["a", "b"], [0, 0]), (32, 32), "")

    within = Sampler(pipeline, tiny.mesh(), guidance=4.0, interval=(0, 999), **settings)
    guided, alone = (drawn(Sampler(pipeline, tiny.mesh(), guidance=scale, **settings)) for scale in (4.0, 1.0))
    assert_close(drawn(within), guided, 4 * 7 * NETWORK)
    within._guidance = within._guidance._replace(interval=(np.float32(0.5), np.float32(0.5)))  # between two
    assert_close(drawn(within), alone, 4 * NETWORK)
    assert np.abs(guided - alone).max() > 10 * 4 * 7 * NETWORK


def test_devices_exchange_nothing_for_pairs(inputs: Path) -> None:
    """They draw, decode and score their own rows."""
    pipeline, mesh = pipelines.load_pipeline(inputs / "base"), tiny.mesh(data=2)
    settings = {"steps": 4, "guidance": 2.0, "interval": (200, 800)}  # with guidance and without, in one program
    sampler = Sampler(pipeline, mesh, solver="dpmpp_2m", batch=4, seed=0, **settings)
    (scorer,), rows = open_scorers(str(inputs / "scorer"), mesh), batch_sharding(mesh)

    def shape(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rows)

    traced = [
        *sampler.traced((32, 32)),
        jax.jit(scorer.judge).trace(shape(4, 32, 32, 3), shape(4, 77, dtype=jnp.int32)),
    ]
    for program in traced:
        text = program.lower().compile().as_text()
        assert "num_partitions=2" in text
        assert not re.search(r"all-gather|all-reduce|all-to-all|collective-permute", text)


class Blank:
    """Winners and losers of zeros: what a build does beside drawing."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.dropped: set[str] = set()  # photographs

    def begin(self, group: Group) -> Callable[[], list]:
        height, width = (side // 8 for side in group.resolution)
        name, blank = group.photographs[0].id, np.zeros((height, width, tiny.LATENT[-1]), np.float16)
        self.said.append(f"begin {name}")

        def finish() -> list:
            self.said.append(f"finish {name}")
            kept = [i for i, photograph in enumerate(group.photographs) if photograph.id not in self.dropped]
            return [group.record(i, blank, loser=blank, loser_score=0.0) for i in kept]

        return finish


@pytest.fixture
def blank(monkeypatch: pytest.MonkeyPatch) -> Blank:
    winners = Blank()
    monkeypatch.setattr(build, "winners_of", lambda *_: winners)
    return winners


def test_devices_have_the_next_prompts_before_the_last_ones_are_fetched(
    make: Make, tmp_path: Path, blank: Blank
) -> None:
    build.build(make("stage1", pool_size=2, batch=4), tmp_path)  # two prompts at a time
    begun, finished = ([i for i, what in enumerate(blank.said) if what.startswith(w)] for w in ("begin", "finish"))
    assert len(begun) == len(finished) == 4  # 2 + 2 + 1 to train on, 2 held out
    assert all(next_one < last for next_one, last in zip(begun[1:], finished, strict=False))


def content(folder: Path) -> dict[Path, tuple[int, int]]:
    """Path → size and time of all files in a folder."""
    found = ((path, path.stat()) for path in folder.rglob("*") if path.is_file())
    return {path: (about.st_size, about.st_mtime_ns) for path, about in found}


def test_a_check_of_a_run_says_what_is_there_and_writes_nothing(
    workdir: Path, make: Make, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    before = content(workdir)
    check_pairs(make("stage3", winner="sdrecon", strengths=(1,), loser="stage2"), workdir)
    shown = capsys.readouterr().out
    assert re.search(rf"stage3 pairs: folder: {workdir}/stage3/pairs holds (\d) of \1 shards already\n", shown)
    assert "memory" not in shown and "disk" not in shown  # for what is there already
    other = make("stage1", steps=5)
    with lock(workdir / "stage2" / "pairs"), pytest.raises(UserError, match="stage2/pairs: is being written by"):
        check_pairs(make("stage2", winner="sdrecon", loser="stage1", keep_if_winner_scores_higher=True), workdir)
    with pytest.raises(UserError, match=r"pairs\.steps=5: .*stage1/pairs was made with 4; use that"):
        check_pairs(other, workdir)
    other = make("other", winner="photograph", loser="stage1")
    shutil.copytree(other.pairs.scorer, tmp_path / "scorer")
    about = tmp_path / "scorer" / "config.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"changed": True}))
    other.pairs.scorer, other.data.resolutions = str(tmp_path / "scorer"), ("64x64",)
    with pytest.raises(UserError) as error:
        check_pairs(other, workdir)
    scorer, size = str(error.value).split("; also: ")
    assert scorer.startswith("content of pairs.scorer=sha256 ") and "stage1/pairs: were built for 32x32" in size
    assert content(workdir) == before


def test_the_disk_that_pairs_will_take_is_foretold(workdir: Path, make: Make, tmp_path: Path) -> None:
    config, index = make("stage1"), Index()
    _, photographs = read_photographs(config, workdir, index)
    plan = plan_shards(config, workdir / "stage1" / "pairs", photographs, None, index)
    largest = max(part.path.stat().st_size for part in plan)  # there twice while it is put together
    pipeline = pipelines.of_shapes(open_source(config.model.base))
    there = sum(part.path.stat().st_size for part in plan)
    assert disk.bytes_of_pairs(config, plan, pipeline) == there + largest  # whole blocks of 64 KiB
    assert disk.bytes_of_candidates(config, plan, pipeline) == 7 * 3 * 4 * 4 * 8 * 2
    many = [ShardPlan(tmp_path / "shard", "train", "32x32", list(photographs["train"]) * 200)]
    record = next(iter(open_stage(workdir, "stage1").by_id("train").values()))
    shards.write_shard(many[0].path, features(8, 77, loser=True), [record | {"id": f"{i:030}"} for i in range(1000)])
    foretold = disk.bytes_of_pairs(config, many, pipeline)
    assert many[0].path.stat().st_size == pytest.approx(foretold - 125 * 2 * 2**16, rel=0.1)  # without the parts


def test_a_dry_run_draws_what_the_run_would_and_keeps_nothing(
    workdir: Path, make: Make, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, drawn = content(workdir), []
    records = build.Builder.draw
    monkeypatch.setattr(build.Builder, "draw", lambda *given: drawn.append(records(*given)) or drawn[-1])
    dry_run(make("stage1"), workdir, 9, tmp_path / "look.png")
    assert content(workdir) == before
    kept = open_stage(workdir, "stage1").by_id("train")
    assert len(drawn[0]) == 1 and sum(map(len, drawn[1:])) == 7  # all there are, after the one that compiles
    for record in drawn[1]:
        assert_close(record["winner"], kept[record["id"]]["winner"], 2**-11)
    shown = capsys.readouterr().out
    assert re.search(r"stage1 pairs: dry run: 7 prompts in \S+ s, \S+ s for each of 21 images\n", shown)
    assert re.search(r"stage1 pairs: dry run: all 7 prompts take about \S+ minutes here\n", shown)
    with Image.open(tmp_path / "look.png") as picture:
        assert picture.height == 4 + 2 * (64 + 4)  # two rows, doubled
    with pytest.raises(UserError, match=r"--sheet look\.jpg: expects a \.png file in a folder that exists"):
        dry_run(make("stage1"), workdir, 1, Path("look.jpg"))


def test_hours_of_a_dry_run_count_pixels(make: Make, capsys: pytest.CaptureFixture) -> None:
    config = make("stage1")
    config.data.resolutions = ("32x32", "64x64")
    one = Photograph("a.png", Path("a.png"), "a")
    plan = [ShardPlan(Path(), "train", "32x32", [one] * 10), ShardPlan(Path(), "train", "64x64", [one] * 5)]
    groups = grouped(plan, 4, 9)
    assert [(part.resolution, begin) for part, begin in groups] == [("32x32", 0), ("32x32", 4), ("32x32", 8)]
    report(config, plan, groups, 4, 360.0, 1.0)  # 10 prompts, of 10 + 4 · 5
    assert "10 prompts in 360 s, 12 s for each of 30 images\n" in (shown := capsys.readouterr().out)
    assert "all 15 prompts take about 0.3 hours here\n" in shown


def test_a_stopped_build_goes_on_and_ends_with_the_same_files(workdir: Path, make: Make) -> None:
    folder = workdir / "stage1" / "pairs"
    before = {path.name: file_hash(path) for path in folder.iterdir()}
    kept = (folder / "pairs-train_32x32.array_record-00000-of-00003").stat().st_mtime_ns
    (folder / "manifest.json").unlink()
    (folder / "pairs-train_32x32.array_record-00001-of-00003").unlink()
    (folder / ".partial.pairs-train_32x32.array_record-00001-of-00003").write_bytes(b"half a file")
    build.build(make("stage1"), workdir)
    assert {path.name: file_hash(path) for path in folder.iterdir()} == before
    assert (folder / "pairs-train_32x32.array_record-00000-of-00003").stat().st_mtime_ns == kept


@pytest.mark.usefixtures("glance", "blank")
def test_photographs_of_two_shapes_become_pairs_of_two_shapes_in_every_stage(
    make: Make, inputs: Path, tmp_path: Path
) -> None:
    folder = tiny.write_photographs(tmp_path / "photographs", train=4, heldout=2)
    tall = [p for split in ("train", "heldout") for p in list_photographs(folder, split)][1::2]
    for photograph in tall:
        Image.open(photograph.picture).resize((40, 80)).save(photograph.picture)
    for stage, how in (("stage1", {}), ("stage2", {"winner": "sdrecon", "strengths": (5,), "loser": "stage1"})):
        config = make(stage, **how)
        config.data.photographs, config.data.resolutions = str(folder), ("32x32", "64x32")
        build.build(config, tmp_path)
        for role, names in (("train", 2), ("heldout", 1)):
            square, high = open_stage(tmp_path, stage).sources[role]
            assert [record["winner"].shape for record in square] == [(4, 4, 8)] * names
            assert [record["loser"].shape for record in high] == [(8, 4, 8)] * names
            assert {record["id"].decode() for record in high} <= {p.id for p in tall}
    config.stage, config.train.steps, config.train.batch = "stage1", 2, 8
    train(config, tmp_path)
    assert stage_config(tmp_path, "stage1").data.resolutions == ["32x32", "64x32"]


@pytest.mark.usefixtures("blank")
def test_all_stages_have_the_resolutions_that_the_first_pairs_chose(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, run = tiny.write_photographs(tmp_path / "photographs", train=8, heldout=2), tmp_path / "run"
    every = [p for split in ("train", "heldout") for p in list_photographs(folder, split)]
    for number, photograph in enumerate(every):
        Image.open(photograph.picture).resize((150, 300) if number % 3 else (200, 199)).save(photograph.picture)

    def auto(stage: str, area: str = "128x64", **how: Any) -> ConfigDict:
        config = make(stage, **how)
        config.data.update(photographs=str(folder), resolutions=("auto",), area=area)
        return config

    with pytest.raises(
        UserError, match=r"data\.resolutions=auto: no pairs of .*run were built with it and data\.area=128"
    ):
        train(auto("stage1"), run)
    broken = auto("stage1")
    broken.model.vae = "/no/such/folder"
    with pytest.raises(UserError, match=r"model\.vae"):
        build.build(broken, run)  # which binds nobody to what it chose
    build.build(auto("stage1", "64x64"), tmp_path / "other")
    assert "stage1 pairs: 64x64 (height x width): 10; 0 enlarged, 6 cropped by more than 10%" in capsys.readouterr().out
    build.build(auto("stage1"), run)
    assert (
        "stage1 pairs: 128x64 (height x width): 6, 64x64: 4; 0 enlarged, 0 cropped by more than 10%\n"
        in capsys.readouterr().out
    )
    for photograph in every:  # the same photographs would choose otherwise now
        Image.open(photograph.picture).resize((300, 150)).save(photograph.picture)
    assert choose_resolutions(auto("stage2"), "train", "heldout", index=Index()) == ["64x128"]
    build.build(auto("stage2", winner="sdrecon", strengths=(5,), loser="stage1"), run)
    for stage in ("stage1", "stage2"):
        made_from = open_stage(run, stage).manifest["made_from"]
        assert made_from["data.resolutions"] == ["128x64", "64x64"] and made_from["data.area"] == "128x64"
    with pytest.raises(
        UserError, match="config key data.area='64x64': .*stage2/pairs was made with '128x64'; use that"
    ):
        build.build(auto("stage2", "64x64", winner="sdrecon", strengths=(5,), loser="stage1"), run)
    monkeypatch.setattr(loop, "_run", lambda *_: None)
    train(auto("stage2", winner="sdrecon", strengths=(5,), loser="stage1"), run)
    assert stage_config(run, "stage2").data.resolutions == ["128x64", "64x64"]


def test_another_config_does_not_touch_finished_pairs(workdir: Path, make: Make) -> None:
    before = file_hash(workdir / "stage1" / "pairs" / "manifest.json")
    with pytest.raises(UserError, match="config key pairs.guidance=3.0: .*/stage1/pairs was made with 2.0; use that"):
        build.build(make("stage1", guidance=3.0), workdir)
    assert file_hash(workdir / "stage1" / "pairs" / "manifest.json") == before


def test_a_stage_before_its_predecessor_names_the_command(make: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"stage1/pairs: are missing; build them with: .*configs/stage1.py"):
        build.build(make("stage2", winner="sdrecon", loser="stage1"), tmp_path)


def test_losers_come_from_pairs_of_the_same_base_and_scorer(
    workdir: Path, inputs: Path, make: Make, tmp_path: Path
) -> None:
    (tmp_path / "stage1").mkdir()
    shutil.copytree(workdir / "stage1" / "pairs", tmp_path / "stage1" / "pairs")
    config = make("stage2", winner="sdrecon", loser="stage1", scorer=str(tiny.write_scorer(tmp_path / "scorer", 7)))
    with pytest.raises(UserError, match="content of pairs.scorer=sha256 .*stage1/pairs was made with .*; use that"):
        build.build(config, tmp_path)
    config = make("stage2", winner="sdrecon", loser="stage1")
    config.model.base = str(tiny.write_base(tmp_path / "base"))
    scheduler = tmp_path / "base" / "scheduler" / "scheduler_config.json"
    write_json(scheduler, json.loads(scheduler.read_text()) | {"beta_end": 0.013})
    with pytest.raises(UserError, match="content of model.base=sha256 .*stage1/pairs was made with .*; use that"):
        build.build(config, tmp_path)
    with pytest.raises(UserError, match="content of model.base=sha256 .*stage1/pairs was made with .*; use that"):
        train(tiny.config(tmp_path / "base"), tmp_path)
    assert not (tmp_path / "stage2" / "pairs" / "building.json").exists()


@pytest.mark.parametrize("group, key, wrong", [
    ("data", "resolutions", ("500x500",)),
    ("model", "vae", "/no/such/folder"),
    ("model", "vae", "scorer"),
    ("pairs", "scorer", ""),
    ("pairs", "scorer", "photographs"),
    ("model", "lora", "/no/such/file"),
])  # fmt: skip
@pytest.mark.usefixtures("blank")
def test_what_is_refused_leaves_nothing(
    make: Make, inputs: Path, tmp_path: Path, group: str, key: str, wrong: Any
) -> None:
    config = make("stage1")
    config[group][key] = str(inputs / wrong) if isinstance(wrong, str) and wrong else wrong
    with pytest.raises(UserError) as error:
        build.build(config, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert key != "scorer" or "config key pairs.scorer" in str(error.value)
    left = [path.name for path in (tmp_path / "run").rglob("*")] if (tmp_path / "run").exists() else []
    assert set(left) <= {"content.json"}


def test_a_mistake_that_shows_with_the_first_pairs_leaves_nothing(
    make: Make, inputs: Path, tmp_path: Path, blank: Blank, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise UserError("its score is NaN")

    with monkeypatch.context() as patch:
        patch.setattr(blank, "begin", broken)
        with pytest.raises(UserError, match="its score is NaN"):
            build.build(make("stage1", guidance=1.0), tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["content.json"]
    build.build(make("stage1", guidance=2.0), tmp_path)
    folder = tmp_path / "stage1" / "pairs"
    assert json.loads((folder / "building.json").read_text())["pairs.guidance"] == 2.0
    assert json.loads((folder / "without_pair.json").read_text()) == {}


def test_missing_photographs_are_counted_before_the_easy_stage_is_paid_for(
    make: Make, tmp_path: Path, blank: Blank, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
) -> None:
    folder = tiny.write_photographs(tmp_path / "photographs", train=6, heldout=2)
    gone, empty, text, dark, *_ = list_photographs(folder, "train")
    config = make("stage1")
    config.data.photographs = str(folder)
    gone.picture.unlink()
    empty.picture.write_bytes(b"")
    text.picture.write_text("no picture")
    build.build(config, tmp_path)
    (line,) = [message for message in caplog.messages if "cannot be opened" in message]
    assert line.startswith(
        f"3 of 8 photographs cannot be opened, 1 of them are missing; the first is {gone.picture} (No "
    )
    config = make("stage2", winner="sdrecon", strengths=(5,), loser="stage1", keep_if_winner_scores_higher=True)
    config.data.photographs = str(folder)
    blank.dropped = {dark.id}
    capsys.readouterr()
    build.build(config, tmp_path)
    reasons = {gone.id: "its file is missing", dark.id: "its winner scores lower than its loser"}
    reasons |= dict.fromkeys((empty.id, text.id), "it is no picture that can be read")
    assert json.loads((tmp_path / "stage2" / "pairs" / "without_pair.json").read_text()) == reasons
    printed = capsys.readouterr().out
    assert "stage2/pairs: 2 of 6 train examples have a pair" in printed
    assert "pairs: 4 have none: it is no picture that can be read (2), " in printed
    config = make("stage3", winner="sdrecon", strengths=(1,), loser="stage2")
    config.data.photographs = str(folder)
    build.build(config, tmp_path)
    third = json.loads((tmp_path / "stage3" / "pairs" / "without_pair.json").read_text())
    assert third == dict.fromkeys(reasons, "it has none in stage2")


@pytest.mark.usefixtures("blank")
def test_photographs_that_are_all_missing_are_refused(make: Make, tmp_path: Path) -> None:
    folder = tiny.write_photographs(tmp_path / "photographs", train=3, heldout=2)
    shutil.rmtree(folder / "photographs")
    config = make("stage1")
    config.data.photographs = str(folder)
    with pytest.raises(UserError, match=r"5 of 5 photographs cannot be opened, 5 of them .*; is their folder mounted"):
        build.build(config, tmp_path / "run")


def test_photographs_of_which_none_has_a_pair_are_one_line(workdir: Path, make: Make, tmp_path: Path) -> None:
    (tmp_path / "stage1").mkdir()
    shutil.copytree(workdir / "stage1" / "pairs", tmp_path / "stage1" / "pairs")
    config = make("stage2", winner="sdrecon", loser="stage1")
    config.data.photographs = str(tmp_path / "others")
    (tmp_path / "others").mkdir()
    for i in range(4):
        Image.new("RGB", (64, 64), (i, i, i)).save(tmp_path / "others" / f"{i}.png")
        (tmp_path / "others" / f"{i}.txt").write_text("a woman")
    for command in (check_pairs, build.build):
        with pytest.raises(UserError, match="others: none has a pair in .*stage1/pairs, from where stage1 takes"):
            command(config, tmp_path)
    assert not (tmp_path / "stage2" / "pairs").exists()  # the right ones may come next


def test_only_what_the_pairs_depend_on_must_stay(
    workdir: Path, make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("hgdpo_jax.run.index.file_hash", lambda path: pytest.fail(f"{path} was read again"))
    config = make("stage1", batch=16)  # images at a time: nothing but rounding
    config.train.lr = 1.0
    build.build(config, workdir)
    assert "stage1/pairs: already built" in capsys.readouterr().out
    config.model.dtype = "bfloat16"
    with pytest.raises(UserError, match="config key model.dtype='bfloat16': .*/stage1/pairs was made with 'float32'"):
        build.build(config, workdir)


def test_one_command_at_a_time_builds_pairs(workdir: Path, make: Make) -> None:
    with lock(workdir / "stage1" / "pairs"), pytest.raises(UserError, match="pairs: is being written by"):
        build.build(make("stage1"), workdir)


def test_photographs_may_move_but_not_change(workdir: Path, inputs: Path, make: Make, tmp_path: Path) -> None:
    shutil.copytree(workdir, tmp_path / "run")
    shutil.copytree(inputs / "photographs", tmp_path / "moved")
    config = make("stage3", winner="sdrecon", strengths=(1,), loser="stage2")
    config.data.photographs = str(tmp_path / "moved")
    before = file_hash(tmp_path / "run" / "stage3" / "pairs" / "manifest.json")
    build.build(config, tmp_path / "run")
    used = open_stage(tmp_path / "run", "stage3").by_id("heldout")
    changed = next(p for p in list_photographs(tmp_path / "moved", "heldout") if p.id in used)
    Image.new("RGB", (64, 64)).save(changed.picture)
    line = rf"photograph {changed.id}: is sha256 \w{{12}}…, pair shard .*-00000-of-00001 was made from sha256 \w{{12}}…"
    with pytest.raises(UserError, match=line):
        build.build(config, tmp_path / "run")
    captions = tmp_path / "moved" / "captions.jsonl"
    captions.write_text(captions.read_text().replace("woman", "lady").replace("man", "gentleman"))
    with pytest.raises(UserError, match="its caption was .* lady, .*; give that"):
        build.build(config, tmp_path / "run")
    assert file_hash(tmp_path / "run" / "stage3" / "pairs" / "manifest.json") == before


@pytest.mark.usefixtures("blank")
def test_a_repaired_photograph_is_taken_in(make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tiny.write_photographs(tmp_path / "photographs", train=3, heldout=1)
    train_photographs = list_photographs(folder, "train")
    whole = {photograph.picture: photograph.picture.read_bytes() for photograph in train_photographs}
    config = make("naive", winner="photograph", loser="pool", shard_size=2)
    config.data.photographs = str(folder)

    for path in whole:
        path.write_bytes(b"no picture")
    with pytest.raises(UserError, match="none of the 3 photographs of split train can be read; repair them"):
        build.build(config, tmp_path / "run")
    first, second, third = whole
    first.write_bytes(whole[first])
    second.write_bytes(whole[second])
    build.build(config, tmp_path / "run")
    done = open_stage(tmp_path / "run", "naive")
    assert list(done.by_id("train")) == [p.id for p in train_photographs[:2]]

    third.write_bytes(whole[third])
    build.build(config, tmp_path / "run")  # finished: somebody may have learnt from them
    assert "a photograph that could not be read has changed since; remove the shard" in caplog.text
    assert open_stage(tmp_path / "run", "naive").hash == done.hash
    (tmp_path / "run" / "naive" / "pairs" / "pairs-train_32x32.array_record-00001-of-00002").unlink()
    build.build(config, tmp_path / "run")
    assert len(open_stage(tmp_path / "run", "naive").by_id("train")) == 3


def test_a_photograph_itself_may_win_over_a_drawing(make: Make, tmp_path: Path) -> None:
    config = make("naive", winner="photograph", loser="pool", pool_size=1)
    build.build(config, tmp_path)
    found = open_stage(tmp_path, "naive").by_id("train")
    photographs, images = load_images(list_photographs(config.data.photographs, "train"), (32, 32))
    vae = pipelines.load_pipeline(config.model.base).vae
    assert list(found) == [p.id for p in photographs]
    latents = np.stack([found[p.id]["winner"] for p in photographs]).astype(np.float32)
    assert_close(latents, vae.to_latents(jnp.asarray(images)), NETWORK + 2**-11)  # stored in float16
    assert all((found[p.id]["loser"] != found[p.id]["winner"]).any() for p in photographs)


def test_a_score_that_is_no_number_names_the_prompt(make: Make, inputs: Path, tmp_path: Path) -> None:
    broken = load_model(CLIPModel, inputs / "scorer")
    broken.logit_scale[...] = 1e4  # its exponential is infinite
    save_model(broken, tmp_path / "scorer")
    config = make("stage1")
    config.pairs.scorer = str(tmp_path / "scorer")
    first = list_photographs(config.data.photographs, "train")[0]
    with pytest.raises(UserError, match=f"prompt '{first.caption}' of {first.id}: its score is NaN or infinite"):
        build.build(config, tmp_path / "run")
    assert not list((tmp_path / "run" / "stage1" / "pairs").glob("pairs-*"))


def test_a_loser_of_another_caption_is_refused(workdir: Path, make: Make, inputs: Path, tmp_path: Path) -> None:
    shutil.copytree(workdir / "stage1", tmp_path / "run" / "stage1")
    shutil.copytree(inputs / "photographs", tmp_path / "photographs")
    listed = tmp_path / "photographs" / "captions.jsonl"
    first, *others = map(json.loads, listed.read_text().splitlines())
    lines = [first | {"caption": "somebody else"}, *others]
    listed.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = make("stage2", winner="sdrecon", loser="stage1")
    config.data.photographs = str(tmp_path / "photographs")
    line = rf"its caption was '{re.escape(first['caption'])}' when .*stage1/pairs was made, and is 'somebody else"
    with pytest.raises(UserError, match=line):
        build.build(config, tmp_path / "run")
    checked = make("other", winner="photograph", loser="stage1")
    checked.data.photographs = config.data.photographs
    with pytest.raises(UserError, match=line):
        check_pairs(checked, tmp_path / "run")
    config.data.photographs = str(inputs / "photographs")
    build.build(config, tmp_path / "run")  # nothing was made of the others
