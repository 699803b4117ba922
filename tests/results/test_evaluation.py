"""The evaluation: what is drawn, measured, kept and shown of a tiny run."""

import functools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from hgdpo_jax.browsing import study
from hgdpo_jax.config import to_json
from hgdpo_jax.data.photographs import Photograph, list_photographs
from hgdpo_jax.devices.xla import use_precision
from hgdpo_jax.diffusion.pipeline import Pipeline
from hgdpo_jax.diffusion.sampler import Sampler
from hgdpo_jax.evaluate import _print_runs as print_runs
from hgdpo_jax.evaluate import print_table
from hgdpo_jax.pictures.read import read_image
from hgdpo_jax.pictures.sheet import GAP
from hgdpo_jax.results import evaluation, images, measured, runs
from hgdpo_jax.results.evaluation import Evaluator, _persons, drawn_before, evaluate, heldout, inputs_of
from hgdpo_jax.results.measured import MODELS, groups, single
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import json_hash, write_json
from hgdpo_jax.run.index import Index
from hgdpo_jax.scoring import judges, personalised
from hgdpo_jax.scoring.comparison import METRICS, OF_PHOTOGRAPHS
from hgdpo_jax.training import loop
from tests import tiny
from tests.results.test_exported import at_once


def once(make: Callable[..., Any]) -> Callable[..., Any]:
    """Makes something, and gives it out whatever else is asked for later."""
    made: list[Any] = []

    def given(*arguments: Any, **settings: Any) -> Any:
        made.extend([] if made else [make(*arguments, **settings)])
        return made[0]

    return given


def test_the_command_writes_results_and_a_report_that_stands_alone(
    one_level: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The steps are left out, and the networks loaded and compiled once."""
    monkeypatch.setattr(judges, "VIEWS", 1)
    monkeypatch.setattr(evaluation, "Judges", functools.cache(judges.Judges))
    monkeypatch.setattr(judges, "open_scorer", functools.cache(judges.open_scorer))
    for module in (evaluation, measured):
        monkeypatch.setattr(module, "local_mesh", functools.cache(tiny.mesh))
    monkeypatch.setattr(loop, "_run", at_once)
    load = once(measured.load_trainable)
    for module in (measured, images):
        monkeypatch.setattr(module, "load_trainable", load)
    monkeypatch.setattr(Sampler, "from_config", once(Sampler.from_config))
    config, workdir = tiny.config(one_level, steps=1), tmp_path / "run"
    use_precision(config.model.dtype)  # as a command does first: programs are traced again for another
    config.data.photographs = str(tiny.write_photographs(tmp_path / "photographs", train=1, heldout=3))
    scorer = str(tiny.write_scorer(tmp_path / "scorer"))
    config.pairs.scorer = config.evaluate.scorer = config.evaluate.other_scorer = config.evaluate.cmmd = scorer
    own = tmp_path / "brightness.py"
    own.write_text("def score(images, prompts): return images.mean((1, 2, 3))")
    config.evaluate.scorers = str(own)
    with pytest.raises(UserError, match="stage1 was not trained"):
        evaluate(config, workdir)
    assert not workdir.exists()
    tiny.write_pairs(workdir / "stage1" / "pairs", heldout=4)
    loop.train(config, workdir)
    config.train.update(lora_rank=5, lora_alpha=3.0)  # the run's own rank counts
    log = workdir / "stage1" / "logs" / "metrics.jsonl"
    log.parent.mkdir()
    log.write_text('{"step": 0, "heldout/loss/dpo": 0.7}\n{"step": 1, "a')  # half a line of a run that was killed
    first = evaluate(config, workdir)
    written, easy = (workdir / "results.json").read_text(), first["models"]["easy"]
    assert json.loads(written) == first and list(first["models"]) == ["base", "easy"]
    assert first["models"]["base"]["win_rate"] == 0.5 and first["images_per_model"] == first["people"] == 3
    assert set(METRICS) - set(easy) == {"fid", "kid", "fd_dinov2"} and easy["cmmd"] > 0
    assert easy["third_score"] == easy["second_score"] == pytest.approx(easy["preference_score"])
    assert easy["brightness"] == pytest.approx(
        float(np.load(workdir / "evaluation" / "easy.npz")["scored_brightness"].mean())
    )
    assert "hps" in first["not_measured"] and "pickscore" not in first["not_measured"]
    assert "HPS v2.1&nbsp;↑" in (workdir / "report.html").read_text()  # an empty column
    assert "brightness&nbsp;↑" in (workdir / "report.html").read_text()
    scores = [row["preference_score"] for row in first["models"].values()]
    assert len(set(scores)) == 2 and len(first["differences"]) == 0
    page = (workdir / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert page.count("<img") == 1 + 3 * 3 + 2 * 4  # curves; base, easy, photograph; winners and losers

    pictures = [np.load(workdir / "evaluation" / f"{name}.npz")["pictures"] for name in ("base", "easy")]
    shown = np.asarray(Image.open(workdir / "portrait.png"))[GAP:, -3 * (64 + GAP) :]
    rows = [row[:64:2, : 3 * 68].reshape(32, 3, 68, 3)[:, :, :64:2] for row in (shown, shown[64 + GAP :])]
    assert np.array_equal(rows, np.swapaxes(pictures, 1, 2)) and not (workdir / "persons.png").exists()

    drawn = study.read_drawn(workdir, "easy")  # what people are asked about
    held = list_photographs(config.data.photographs, "heldout")
    assert np.array_equal(drawn.pictures, pictures[1]) and drawn.captions == [person.caption for person in held]

    kept = (workdir / "evaluation" / "easy.npz").stat().st_mtime_ns
    evaluate(config, workdir)
    assert (workdir / "results.json").read_text() == written
    assert (workdir / "evaluation" / "easy.npz").stat().st_mtime_ns == kept
    print_table(first)
    rows = [[cell.strip() for cell in line.split("│")] for line in capsys.readouterr().out.splitlines()]
    assert [row[2:-1] for row in rows if row[1:2] == ["easy"]] == [
        [f"{easy[name]:.3f}" for name in (*METRICS, "brightness") if name in easy]
    ]
    config.stage = "naive"
    with pytest.raises(UserError, match="naive was not trained in .*; run first: .*configs/naive.py"):
        evaluate(config, workdir)
    runs_are_compared(tmp_path, [f"{workdir}:base", f"{workdir}:easy"], monkeypatch, capsys)


def runs_are_compared(
    folder: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The same run's stages as rows of a comparison, with prompts of one's own and with the held-out captions."""
    for module in (runs, images):
        monkeypatch.setattr(module, "local_mesh", evaluation.local_mesh)
    monkeypatch.setattr(runs, "Judges", evaluation.Judges)
    monkeypatch.setattr(runs, "Sampler", Sampler.from_config)  # which was made
    prompts, out, few = folder / "prompts.txt", folder / "out", ["evaluate.batch=4"]
    prompts.write_text("a dog\na cat\na horse\n")
    found = runs.compare_runs(asked, prompts, 2, out, few)
    first, other = (found["models"][name] for name in asked)
    assert json.loads((out / "results.json").read_text()) == found
    assert (found["prompts"], found["seeds"], first["second_win_rate"]) == (3, [0, 1], 0.5)
    assert found["config"]["batch"] == 4
    difference = found["differences"][f"{asked[1]} - {asked[0]}"]
    assert difference["sharpness"] == pytest.approx(other["sharpness"] - first["sharpness"]) and difference["sharpness"]
    reasons = {name: found["absent"][name] for name in ("kernel_distance", "cmmd", "fid")}
    assert set(reasons.values()) == {"needs photographs of the prompts"} and set(found["absent"]) == OF_PHOTOGRAPHS
    page = (out / "report.html").read_text()
    assert page.count("<img") == 2 * 3 and not re.search(r'(src|href)="(?!data:)', page) and "CMMD" in page
    kept = {path: path.stat().st_mtime_ns for path in (out / "drawn").glob("*.npz")}
    one = [np.load(path)["pictures"] for path in kept]
    assert len(kept) == 4 and len({pictures.tobytes() for pictures in one}) == 4
    again = runs.compare_runs(asked[::-1], prompts, 3, out, few)  # what was drawn is not drawn again
    assert len(again["seeds"]) == 3 and len([*(out / "drawn").glob("*.npz")]) == 6
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    with_photographs = runs.compare_runs(asked, None, 1, folder / "other", few)
    assert set(with_photographs["absent"]) == {"fid", "kid", "fd_dinov2"} and with_photographs["prompts"] == 3
    assert with_photographs["absent"]["kid"] == "evaluate.inception is not set"
    print_runs(with_photographs)
    printed = capsys.readouterr().out
    assert (
        f"{asked[1]} - {asked[0]}, beyond chance:" in printed
        and "not measured, evaluate.inception is not set: FID" in printed
    )
    drawn_otherwise = runs.parse_run(f"{asked[1]}+lan")
    assert drawn_otherwise.normalise and drawn_otherwise.stage == "stage1" and not drawn_otherwise.text_encoder
    whole = runs.parse_run(f"{asked[1]}+1+all")
    assert (whole.weight, whole.blocks, drawn_otherwise.weight, drawn_otherwise.blocks) == (1.0, "all", None, None)
    for rows, seeds, where, own, line in (
        (asked[:1], 1, out, [], "expects two or more runs, each once"),
        (asked, 0, out, [], "--seeds 0: expects a number"),
        (asked, 1, folder / "scorer", [], "--out .*: holds something else; choose another folder"),
        (asked, 1, out, ["train.lr=1"], "override train.lr=1: does nothing with --runs"),
        ([asked[0], f"{asked[1]}+x"], 1, out, [], r"\+x is unknown; expects \+text_encoder, \+lan"),
        ([asked[0], f"{asked[1]}+up+all"], 1, out, [], "one weight and one kind of blocks are enough"),
        (asked, 1, out, ["evaluate.images_per_prompt=8"], "does nothing with --runs, which draws each prompt once"),
        ([asked[0], asked[0].replace(":base", ":hard")], 1, out, [], "stage3 was not trained in"),
        ([asked[0], str(folder / "nothing")], 1, out, [], "no stage was trained in"),
    ):
        with pytest.raises(UserError, match=line):
            runs.compare_runs(rows, prompts, seeds, where, own)
    prompts.write_text("a dog\n")
    with pytest.raises(UserError, match="holds one prompt; intervals are over prompts"):
        runs.compare_runs(asked, prompts, 1, out)


def test_models_are_measured_up_to_the_configs_stage_and_what_there_is_beside_the_curriculum(tmp_path: Path) -> None:
    def names(stage: str) -> list[str]:
        config.stage = stage
        return list(measured.measured(config, tmp_path))

    config = tiny.config(tmp_path)
    for stage in ("stage1", "stage2", "stage3", "naive"):
        config.train.params = "all" if stage == "naive" else "lora"
        write_json(tmp_path / stage / "config.json", to_json(config))
    assert names("stage1") == ["base", "easy", "naive"]
    assert names("stage3") == ["base", "easy", "normal", "hard", "naive"]
    write_json(tmp_path / "text_encoder" / "config.json", to_json(config))
    assert "hard + text encoder" in names("stage3") and "hard + text encoder" not in names("stage2")
    curriculum = ["base", "easy", "normal", "hard"]
    config.train.params = "text_lora"
    write_json(tmp_path / "text_encoder" / "config.json", to_json(config))
    assert names("text_encoder") == [*curriculum, "hard + text encoder", "naive", "text_encoder"]
    config.train.params = "all"
    for stage in ("stage0", "mine"):
        write_json(tmp_path / stage / "config.json", to_json(config))
    assert names("stage0") == ["base", "stage0"]  # the others have another base
    assert names("mine") == [*curriculum, "hard + text encoder", "naive", "mine"]
    assert names("personalise") == ["base", "naive"] == names("naive")
    # Of the stages before, those have to be there that a stage started from.
    (tmp_path / "stage2" / "config.json").unlink()
    assert names("stage3") == ["base", "easy", "hard", "hard + text encoder", "naive"]
    config.train.start = "stage2"
    with pytest.raises(UserError, match="stage2 was not trained in"):
        names("stage3")


def test_models_whose_unets_have_the_same_parameters_are_drawn_together(tmp_path: Path) -> None:
    def trained(params: str, rank: int) -> Any:
        return tiny.config(tmp_path, params=params, lora_rank=rank) if "lora" in params else whole

    whole = tiny.config(tmp_path)
    whole.train.params = "all"
    configs = {"stage1": trained("lora", 2), "stage3": trained("lora", 2), "naive": trained("lora", 16),
               "mine": trained("all", 8), "text_encoder": trained("text_lora", 64)}  # fmt: skip
    models = {name: MODELS[name] for name in ("base", "easy", "hard", "hard + text encoder", "naive")}
    models |= {"mine": ("mine",), "text_encoder": ("text_encoder",)}
    found = groups(models, configs)
    assert [list(group) for group in found] == [["base", "text_encoder", "easy", "hard", "hard + text encoder"],
                                                ["naive"], ["mine"]]  # fmt: skip
    assert [list(group) for group in groups({"base": MODELS["base"]}, {})] == [["base"]]
    assert [list(group) for group in groups({name: models[name] for name in ("base", "text_encoder")}, configs)] == [
        ["base", "text_encoder"]
    ]


class FakeSampler(Sampler):
    """Draws what its seed and the captions say, and counts."""

    batch = 36

    def __init__(self) -> None:
        self.drawn, self.judged = 0, list[int]()

    def keys(self, stream: str, ids: Any, numbers: Any) -> jax.Array:
        return jax.random.key(0)

    def generate(self, ids: np.ndarray, *_: Any, **__: Any) -> np.ndarray:
        self.drawn += len(ids)
        return np.arange(len(ids), dtype=np.float32)[:, None, None, None] * np.ones((2, 2, 3), np.float32)

    def decode(self, latents: np.ndarray, note: str) -> np.ndarray:
        return latents / 100

    def measure_images(self, images: np.ndarray, ids: np.ndarray, judge: Any, note: str) -> dict[str, np.ndarray]:
        self.judged.append(len(images))
        return judge(images, ids)

    measure_latents = measure_images


class FakePipeline(Pipeline):
    def __init__(self) -> None:
        pass

    def tokenize(self, captions: Any) -> np.ndarray:
        return np.full((len(captions), 2), 5)


def judge(images: np.ndarray, input_ids: np.ndarray) -> dict[str, np.ndarray]:
    return {"mean": images.mean((1, 2, 3)), "ids": input_ids}


def evaluator(folder: Path, people: int, judges: Any = judge) -> tuple[Evaluator, FakeSampler]:
    config, sampler = tiny.config(folder), FakeSampler()
    config.evaluate.images_per_prompt, config.data.resolutions = 2, ("2x2",)
    held = [Photograph(str(i), folder / f"{i}.png", "a") for i in range(people)]
    for i, photograph in enumerate(held):
        Image.new("RGB", (2, 2), (20 * i,) * 3).save(photograph.picture)
    return Evaluator(config, FakePipeline(), sampler, judges, held), sampler


def test_what_was_drawn_is_kept_for_the_same_mark(tmp_path: Path) -> None:
    found, sampler = evaluator(tmp_path, 3)
    path = tmp_path / "evaluation" / "easy.npz"
    seen, pictures = found.draw("easy", path, "1")
    assert np.array_equal(seen["mean"], [[0, 1], [2, 3], [4, 5]]) and seen["ids"].shape == (3, 2, 2)
    assert list(pictures[:, 0, 0, 0]) == [128, 130, 133]  # the first of each person
    found.draw("easy", path, "1")
    assert sampler.drawn == 6
    found.draw("easy", path, "2")
    assert sampler.drawn == 12
    whole = path.read_bytes()
    for damaged in (b"", b"PK", whole[:-9], whole[: len(whole) // 2], whole[:200] + b"x" + whole[201:]):
        path.write_bytes(damaged)
        assert drawn_before(path, "2") is None
    np.savez(path, mark=np.array("2"))  # without pictures
    found.draw("easy", path, "2")
    assert sampler.drawn == 18


@pytest.mark.parametrize("score, key", [("score", "pairs.scorer"), ("second_score", "evaluate.scorer"),
                                        ("third_score", "evaluate.other_scorer"),
                                        ("scored_hps", "evaluate.scorers")])  # fmt: skip
def test_a_score_that_is_not_finite_is_refused_with_its_scorers_folder(tmp_path: Path, score: str, key: str) -> None:
    wrong, _ = evaluator(tmp_path, 3, lambda images, input_ids: {score: np.full(len(images), np.nan, np.float32)})
    wrong.config.update_from_flattened_dict({key: "hps=FOLDER" if key == "evaluate.scorers" else "FOLDER"})
    with pytest.raises(UserError, match="FOLDER"):
        wrong.draw("hard", tmp_path / "hard.npz", "1")


def test_views_of_a_few_photographs_are_in_memory_at_a_time(tmp_path: Path) -> None:
    found, sampler = evaluator(tmp_path, 7)
    found = replace(found, features=lambda images: {"fid": images[:, 0, 0]})
    seen = found.measure_photographs()
    assert (
        sampler.judged == [36, 3, 36, 3, 12, 1]
        and seen["fid"].shape == (7, 1, 3)
        and seen["ids"].shape == (7, judges.VIEWS, 2)
    )
    assert np.allclose(seen["mean"], np.arange(7)[:, None] * 20 / 127.5 - 1.0)


def test_what_a_picture_is_made_from_is_drawn_again_where_it_changes(tmp_path: Path) -> None:
    config, index = tiny.config(tmp_path), Index()
    config.pairs.scorer = str(tiny.write_scorer(tmp_path / "scorer"))
    other = str(tiny.write_scorer(tmp_path / "other", seed=4))
    held = [Photograph("a", tmp_path / "a.jpg", "a woman")]
    inputs = [inputs_of(config, "base", held, index), inputs_of(config, "other", held, index)]
    inputs.append(inputs_of(config, "base", [replace(held[0], caption="a man")], index))
    for key, value in (("steps", 3), ("negative_prompt", "blurry"), ("scorer", config.pairs.scorer),
                       ("other_scorer", config.pairs.scorer), ("other_scorer", other),
                       ("scorers", f"clip_score={other}"), ("scorers", f"pickscore={other}"),
                       ("cmmd", other)):  # fmt: skip
        config.evaluate[key] = value
        inputs.append(inputs_of(config, "base", held, index))
    assert len({json_hash(found) for found in inputs}) == len(inputs)


def test_base_and_the_stages_alone_are_shown() -> None:
    for names in (["base"], ["base", "naive"], ["base", "easy", "normal"], ["base", "given"]):
        assert single({name: MODELS[name] for name in names}) == names
    assert single({name: MODELS[name] for name in ("base", "hard", "hard + text encoder")}) == ["base", "hard"]


def test_of_people_that_process_0_did_not_draw_nothing_is_shown() -> None:
    """Of eight processes each may have drawn one person."""
    held, templates = [Photograph(name, Path(name), f"{name}, smiling") for name in "abc"], ["{subject}", "{subject} 2"]
    pictures = np.arange(2.0, dtype=np.float32)[:, None, None, None] * np.ones((4, 4, 3), np.float32)
    measured, found = np.zeros((3, 2), np.float32), np.ones((3, 2), bool)
    people = {"base": personalised.PeoplePictures(measured, measured, found, pictures)}
    (shown,) = _persons(people, held, np.zeros((3, 4, 4, 3), np.float32), templates)
    assert np.array_equal(shown.drawn["base + adapter"], pictures)


def test_of_all_photographs_those_that_are_held_out_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, read = tiny.config(tmp_path), []
    config.data.mirror, config.data.photographs = True, str(tiny.write_photographs(tmp_path / "photographs", 9, 3))
    real = read_image
    monkeypatch.setattr("hgdpo_jax.data.pixels.read_image", lambda picture: read.append(picture) or real(picture))
    held = heldout(config, Index())
    assert len(held) == 3 and sorted(read) == sorted(p.picture for p in held)
