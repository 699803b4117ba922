"""The report: metrics of known sets, and the command on a tiny run."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from hgdpo_jax.curriculum import build
from hgdpo_jax.data.photographs import Photograph
from hgdpo_jax.pictures.read import read_image
from hgdpo_jax.results import report
from hgdpo_jax.results.evaluation import _heldout, _inputs, _measure_photographs, _page, _persons, evaluate
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import json_hash
from hgdpo_jax.run.index import Index
from hgdpo_jax.scoring import judges, personalised
from hgdpo_jax.training.loop import train
from tests import tiny


@pytest.mark.usefixtures("glance")
def test_the_command_writes_results_and_a_report_that_stands_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judges, "VIEWS", 1)
    tiny.write_base(tmp_path / "base")
    config = tiny.config(tmp_path / "base", steps=1)
    config.data.photographs = str(tiny.write_photographs(tmp_path / "photographs", train=9, heldout=3))
    config.pairs.scorer = config.evaluate.scorer = str(tiny.write_scorer(tmp_path / "scorer"))
    config.pairs.update(pool_size=2, sampler="ddim", steps=2, guidance=1.0, batch=8, shard_size=9)
    workdir = tmp_path / "run"
    build.build(config, workdir)
    with pytest.raises(UserError, match="stage1 was not trained"):
        evaluate(config, workdir)
    train(config, workdir)
    first = evaluate(config, workdir)
    written = (workdir / "results.json").read_text()
    assert json.loads(written) == first and list(first["models"]) == ["base", "easy", "easy, whole"]
    assert first["models"]["base"]["win_rate"] == 0.5 and first["images_per_model"] == 3
    config.stage = "naive"
    with pytest.raises(UserError, match="naive was not trained in .*; run first: .*configs/naive.py"):
        evaluate(config, workdir)
    config.stage = "stage1"
    page = (workdir / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert page.count("<img") == 1 + 4 * 3 + 2 * 3  # curves; base, easy twice, photograph; winners and losers
    assert first["models"]["easy"]["second_score"] == pytest.approx(first["models"]["easy"]["preference_score"])
    assert len(first["differences"]) == 0 and first["people"] == 3
    kept = (workdir / "evaluation" / "easy.npz").stat().st_mtime_ns
    evaluate(config, workdir)
    assert (workdir / "results.json").read_text() == written
    assert (workdir / "evaluation" / "easy.npz").stat().st_mtime_ns == kept
    with (workdir / "stage1" / "logs" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "a')  # half a line of a run that was killed
    captions = Path(config.data.photographs) / "captions.jsonl"
    captions.write_text(captions.read_text().replace("portrait", "picture"))
    config.evaluate.scorer = ""
    assert "second_score" not in evaluate(config, workdir)["models"]["easy"]
    assert (workdir / "evaluation" / "easy.npz").stat().st_mtime_ns > kept


def test_what_a_picture_is_made_from_is_drawn_again_where_it_changes(tmp_path: Path) -> None:
    config, index = tiny.config(tmp_path), Index()
    config.pairs.scorer = str(tiny.write_scorer(tmp_path / "scorer"))
    held = [Photograph("a", tmp_path / "a.jpg", "a woman")]
    inputs = [_inputs(config, "base", held, index), _inputs(config, "other", held, index)]
    inputs.append(_inputs(config, "base", [replace(held[0], caption="a man")], index))
    config.evaluate.steps += 1
    inputs.append(_inputs(config, "base", held, index))
    config.evaluate.scorer = config.pairs.scorer
    inputs.append(_inputs(config, "base", held, index))
    assert len({json_hash(found) for found in inputs}) == len(inputs)


def test_the_report_compares_base_with_the_last_stage_that_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was trained: `naive` alone, or nothing that draws otherwise."""
    monkeypatch.setattr(report, "page", lambda **given: given["compared"])
    results = {"models": {"base": {}}}
    for names in (["base"], ["base", "naive"], ["base", "easy", "normal"]):
        drawn = {name: SimpleNamespace(pictures=None) for name in [*names, *(f"{name}, whole" for name in names[1:])]}
        assert _page(results, drawn, {}, [], np.zeros(0), []) == ("base", names[-1])


def test_of_people_that_process_0_did_not_draw_nothing_is_shown() -> None:
    """Of eight processes each may have drawn one person."""
    held, templates = [Photograph(name, Path(name), f"{name}, smiling") for name in "abc"], ["{subject}", "{subject} 2"]
    pictures = np.arange(2.0)[:, None, None, None]
    people = {"base": personalised.PeoplePictures(np.zeros(3), np.zeros(3), np.zeros(3), pictures)}
    (shown,) = _persons(people, held, np.zeros((3, 4, 4, 3)), templates)
    assert np.array_equal(shown.drawn["base + adapter"], pictures)


def test_views_of_a_few_photographs_are_in_memory_at_a_time(tmp_path: Path) -> None:
    held = [Photograph(str(i), tmp_path / f"{i}.png", "a") for i in range(7)]
    for i, photograph in enumerate(held):
        Image.new("RGB", (2, 2), (20 * i,) * 3).save(photograph.picture)
    together = []

    class FakeSampler:
        def whole_batches(self, each: int) -> int:
            return 36 // each

        def measure_images(self, views: np.ndarray, ids: np.ndarray, *_: object) -> dict[str, np.ndarray]:
            together.append(len(views))
            return {"mean": views.mean((1, 2, 3)), "ids": ids}

    tokenizer = SimpleNamespace(tokenize=lambda captions: np.full((len(captions), 2), 5))
    seen = _measure_photographs(FakeSampler(), tokenizer, None, held, (2, 2))
    assert together == [36, 36, 12] and seen["ids"].shape == (7, judges.VIEWS, 2)
    assert np.allclose(seen["mean"], np.arange(7)[:, None] * 20 / 127.5 - 1.0)


def test_of_all_photographs_those_that_are_held_out_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, read = tiny.config(tmp_path), []
    config.data.mirror, config.data.photographs = True, str(tiny.write_photographs(tmp_path / "photographs", 9, 3))
    real = read_image
    monkeypatch.setattr("hgdpo_jax.data.pixels.read_image", lambda picture: read.append(picture) or real(picture))
    held = _heldout(config, Index())
    assert len(held) == 3 and sorted(read) == sorted(p.picture for p in held)
