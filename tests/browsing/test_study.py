"""A study of what two models drew, and what people answered."""

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hgdpo_jax import evaluate
from hgdpo_jax.browsing import study
from hgdpo_jax.run.errors import UserError
from tests.browsing.test_page import EVIL, Elements, held

CAPTIONS = ["a man", EVIL, "a woman", "nobody"]
MODELS = ("secret base", "hard + secret")


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """An evaluated run of two models, of which one draws dark and one bright."""
    (tmp_path / "evaluation").mkdir()
    for i, model in enumerate(MODELS):
        draw(tmp_path, model, 50 + 150 * i)
    return tmp_path


def draw(workdir: Path, model: str, grey: int, captions: list[str] = CAPTIONS, mark: str = "1") -> None:
    pictures = np.full((len(captions), 6, 4, 3), grey, np.uint8)
    path = workdir / "evaluation" / f"{model}.npz"
    np.savez(path, score=np.zeros((4, 1)), pictures=pictures, captions=np.array(captions), mark=np.array(mark))


def answers(workdir: Path, person: str, given: dict[int, tuple[str, str]], **changed: Any) -> Path:
    """The file of a person who found these pictures more natural, and fitting the text better."""
    page = held(study.write_study(workdir, *MODELS).read_text())
    listed = {str(pair): dict(zip(("natural", "text"), both, strict=True)) for pair, both in given.items()}
    path = workdir / f"{person}.json"
    content = {"hgdpo_jax": "answers", "study": page["study"], "person": person, "answers": listed}
    path.write_text(json.dumps(content | changed))
    return path


def test_the_page_shows_pictures_and_captions_and_names_nobody(workdir: Path) -> None:
    path = study.write_study(workdir, *MODELS)
    text = path.read_text(encoding="utf-8")
    shown = held(text)
    assert path == workdir / "study" / f"{shown['study']}.html" and "secret" not in text
    assert [caption for caption, _, _ in shown["pairs"]] == CAPTIONS and shown["size"] == [4, 6]
    for _, *sources in shown["pairs"]:
        opened = [Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) for source in sources]
        assert [image.getpixel((0, 0)) for image in opened] == [(50,) * 3, (200,) * 3]
        assert {image.size for image in opened} == {(4, 6)}
    elements = Elements(text)
    assert len(elements.scripts) == 2 and not re.search(r"https?:|url\(|@import|fetch\(", text)
    (policy,) = [has["content"] for tag, has in elements.found if tag == "meta" and "http-equiv" in has]
    assert policy and policy.startswith("default-src 'none'; img-src data:;")


def test_another_drawing_or_order_is_another_study(workdir: Path) -> None:
    first = study.write_study(workdir, *MODELS)
    assert study.write_study(workdir, *MODELS) == first
    others = {study.write_study(workdir, *MODELS[::-1])}
    draw(workdir, MODELS[0], 50, mark="2")
    others.add(study.write_study(workdir, *MODELS))
    assert len(others | {first}) == 3


def test_win_rates_count_pairs_once_and_ties_half(
    workdir: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = answers(workdir, "one", {0: ("second", "first"), 1: ("second", "first"), 2: ("second", "equal")})
    two = answers(workdir, "two", {0: ("second", "first"), 1: ("first", "first"), 3: ("first", "first")})
    found = study.read_answers(workdir, [one, two])
    assert found.models == MODELS
    rates = study.win_rates(found)
    assert rates["natural"].value == pytest.approx((1 + 0.5 + 1 + 0) / 4)
    assert rates["text"].value == pytest.approx((0 + 0 + 0.5 + 0) / 4)
    low, high = rates["natural"].interval
    assert 0 <= low < 0.4 and 0.85 < high <= 1
    files = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    command = ["evaluate", "--config", "configs/stage3.py:portraits", "--workdir", str(workdir), "--study"]
    monkeypatch.setattr("sys.argv", [*command, str(one), str(two)])
    evaluate.main()
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == files
    natural, text = capsys.readouterr().out.splitlines()
    assert natural.startswith("hard + secret over secret base, more natural: 62.5% (95 % interval ")
    assert natural.endswith("; 4 pairs, 6 answers, 0 of them equal)")
    monkeypatch.setattr("sys.argv", [*command, str(one), "--as", "slow"])
    with pytest.raises(UserError, match="--as slow: does nothing here, --study measures no stage"):
        evaluate.main()
    assert "fits the text better: 12.5% (95 % interval " in text and "6 answers, 1 of them equal" in text


def test_where_all_agree_the_interval_is_a_point(workdir: Path) -> None:
    path = answers(workdir, "one", dict.fromkeys(range(4), ("second", "first")))
    rates = study.win_rates(study.read_answers(workdir, [path]))
    assert [(rate.value, rate.interval) for rate in rates.values()] == [(1, [1, 1]), (0, [0, 0])]


@pytest.mark.parametrize("changed, line", [
    ({"hgdpo_jax": "ratings"}, "is not as it was written .*holds 'ratings', not 'answers'.*; give a file that the"),
    ({"answers": {"0": {"natural": "left"}}}, "is not as it was written .*KeyError: 'left'"),
    ({"answers": {"0": {"beautiful": "first"}}}, "is not as it was written .*KeyError: 'beautiful'"),
    ({"answers": []}, "is not as it was written"),
    ({"study": "0" * 12}, "is of another study than of what is drawn in .*; give that run"),
])  # fmt: skip
def test_a_file_of_something_else_is_refused(workdir: Path, changed: dict[str, Any], line: str) -> None:
    path = answers(workdir, "one", {0: ("first", "first"), 1: ("first", "first")}, **changed)
    with pytest.raises(UserError, match=f"--study {path}: {line}") as error:
        study.read_answers(workdir, [path])
    assert "\n" not in str(error.value)


def test_answers_of_two_studies_or_twice_of_a_person_are_refused(workdir: Path) -> None:
    given = {0: ("first", "first"), 1: ("first", "first")}
    one = answers(workdir, "one", given)
    again = workdir / "copy.json"
    again.write_text(one.read_text())
    with pytest.raises(UserError, match=f"--study {again}: holds the answers of {one} again; give each once"):
        study.read_answers(workdir, [one, again])
    turned = held(study.write_study(workdir, *MODELS[::-1]).read_text())["study"]
    other = answers(workdir, "two", given, study=turned)
    with pytest.raises(UserError, match=f"--study {other}: is of another study than {one}; give those of one"):
        study.read_answers(workdir, [one, other])
    with pytest.raises(UserError, match="nobody.json: no such file"):
        study.read_answers(workdir, [workdir / "nobody.json"])
    with pytest.raises(UserError, match="1 pairs are answered by which is more natural; expects two"):
        study.win_rates(study.read_answers(workdir, [answers(workdir, "one", {0: ("first", "first")})]))


def test_models_that_cannot_be_compared_are_refused(workdir: Path) -> None:
    first, second = MODELS
    with pytest.raises(UserError, match=r"--study easy: expects two of hard \+ secret, secret base"):
        study.write_study(workdir, first, "easy")
    with pytest.raises(UserError, match="--study base: run evaluate first"):
        study.write_study(workdir / "other", "base", "hard")
    with pytest.raises(UserError, match=f"--study {first} {first}: expects two models"):
        study.write_study(workdir, first, first)
    draw(workdir, second, 200, [*CAPTIONS[:3], "somebody"])
    with pytest.raises(UserError, match="were drawn for different captions; run evaluate again"):
        study.write_study(workdir, *MODELS)
    np.savez(workdir / "evaluation" / f"{second}.npz", pictures=np.zeros((4, 6, 4, 3), np.uint8), mark=np.array("1"))
    line = "secret.npz: is not as it was written .*captions.*; remove it, and run evaluate again"
    with pytest.raises(UserError, match=line):
        study.write_study(workdir, *MODELS)
    (workdir / "evaluation" / f"{second}.npz").write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(UserError, match="secret.npz: is not as it was written"):
        study.write_study(workdir, *MODELS)
    assert not (workdir / "study").exists()
