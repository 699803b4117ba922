"""The report's page, as a parser reads it; tests/browser/report.py tries it in a browser."""

import base64
import io
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hgdpo_jax.config import ASSETS
from hgdpo_jax.results import curves, report, tables
from hgdpo_jax.results.report import Report
from hgdpo_jax.scoring.bootstrap import Measure
from hgdpo_jax.scoring.comparison import MEANINGS, METRICS, differences

MODELS = ("base", "easy", "normal", "hard", "hard + text encoder")
EVIL = "a \"woman\" & 'man' </script><script>alert(1)</script><!-- $table ${left}"
RNG = np.random.default_rng(0)


def _log(steps: int, lowest: int) -> list[dict[str, float]]:
    """A stage of so many steps in which held-out pairs, measured every ten, are best at `lowest`."""
    log = []
    for step in range(steps + 1):
        margin = 2 * step / steps + 0.2 * RNG.standard_normal()
        values = {"loss/dpo": 0.69 - 0.2 * margin, "dpo/margin": margin, "dpo/accuracy": 0.5 + 0.15 * margin}
        values |= {"error/winner": 0.2 - 0.01 * margin, "error/winner_reference": 0.2}
        held = values | {"loss/dpo": 0.6 + 1e-4 * (step - lowest) ** 2}
        log.append({"step": step} | (values if step else {}))
        if step % 10 == 0:
            log[-1] |= {f"heldout/{name}": value for name, value in held.items()}
    return log


def measure(value: float) -> Measure:
    """With an interval around it."""
    return Measure(np.array([value, value - 0.021, value + 0.034]))


def example(side: int = 64) -> Report:
    """A report in which the embedded photographs, `side` pixels wide, stand for what the models drew."""
    files = sorted((ASSETS / "portraits" / "photographs").glob("*.jpg"))[: 2 * report.COLUMNS]
    images = np.stack([np.asarray(Image.open(file).resize((side, side))) for file in files]) / np.float32(127.5) - 1
    photographs, others = images[: report.COLUMNS], images[report.COLUMNS :]
    models = {
        name: {
            key: measure((i - 1) * (3.25 if "↑" in title else -1.5) + 4 * (i == 2)) for key, title in METRICS.items()
        }
        for i, name in enumerate(MODELS)
    }
    models["base"]["kernel_distance"] = measure(float("nan"))
    captions = [f"a portrait photograph of a woman, background {i}, soft light" for i in range(report.COLUMNS)]
    pairs, adapted = slice(0, report.PAIRS), ("base + adapter", "hard + adapter")
    return Report(
        head={"Base": "models/base", "Pictures": "40 of each model"},
        lines={name: f"what {name} is" for name in (*MODELS, "photograph")},
        models=models,
        differences=differences(models, (("hard", "base"), ("hard", "easy"))),
        pictures={name: np.clip(others * (0.4 + 0.2 * i), -1, 1) for i, name in enumerate(MODELS)},
        captions=captions,
        photographs=photographs,
        stages={
            name: report.Stage(_log(60, 20 * i), captions[pairs], images[pairs], others[pairs], [(1.5, -0.25)] * 8)
            for i, name in enumerate(MODELS[1:4], start=1)
        },
        compared=("base", "hard"),
        people=[
            report.ConceptPerson(photograph, captions[:3], {name: images[:3] for name in adapted})
            for photograph in photographs[:2]
        ],
        measured=["base + adapter: identity distance 0.719 ± 0.016", "hard + adapter: identity distance 0.72"],
    )


def small() -> Report:
    """The same, with little in it."""
    whole = example(8)
    (name, stage), *_ = whole.stages.items()
    return whole._replace(pictures={"base": whole.photographs, "hard": whole.photographs}, stages={name: stage})


class Parsed(HTMLParser):
    """Elements (tag, attributes, text up to the next one) of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], str]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        if self.elements:
            tag, attributes, text = self.elements[-1]
            self.elements[-1] = tag, attributes, text + data

    def find_all(self, tag: str, **attributes: str) -> Iterator[tuple[dict[str, str | None], str]]:
        """Attributes and text of the elements with this tag and these attributes."""
        for found, has, text in self.elements:
            if found == tag and attributes.items() <= has.items():
                yield has, text.strip()


def sections(page: str) -> list[str | None]:
    return [attributes["id"] for attributes, _ in Parsed(page).find_all("section")]


@pytest.fixture(scope="module")
def page() -> str:
    return report.page(example())


def test_nothing_is_read_from_outside_the_page(page: str) -> None:
    for _, attributes, _ in Parsed(page).elements:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#"))
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttpRequest|\$", page)
    (policy,) = [has["content"] for has, _ in Parsed(page).find_all("meta") if "http-equiv" in has]
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_every_part_is_there(page: str) -> None:
    assert sections(page) == ["compare", "change", "measures", "pictures", "training", "people", "pairs"]
    images = len(list(Parsed(page).find_all("img")))
    assert images == 6 * report.COLUMNS + 3 + 2 * 2 * 4 + 3 * 2 * report.PAIRS
    assert "1.5 against −0.2: a portrait" in page
    assert "base + adapter: identity distance 0.719 ± 0.016" in page
    words = [text for _, text in Parsed(page).find_all("dt")]
    assert words == ["Base", "Pictures", "", "", *MODELS, "photograph", *curves.CURVES]


def shown(value: float) -> str:
    return f"{value:.3f}".replace("-", "−")


def interval(found: Measure) -> str:
    return "[{:.3f}, {:.3f}]".format(*found.interval).replace("-", "−")


def test_the_table_has_values_and_intervals_and_marks_the_best() -> None:
    models = example().models
    parsed = Parsed(tables.of_models(models))
    cells = list(parsed.find_all("td"))
    measures = [row[key] for row in models.values() for key in METRICS]
    assert [has["data-value"] for has, _ in cells] == [str(measure.value) for measure in measures]
    assert [text for _, text in cells] == [shown(measure.value) for measure in measures]
    assert [text for _, text in parsed.find_all("small")] == [interval(measure) for measure in measures]
    columns = {key: [row[key].value for row in models.values()] for key in METRICS}
    best = {key: np.nanmax(column) if "↑" in METRICS[key] else np.nanmin(column) for key, column in columns.items()}
    marked = [has.get("class") == "best" for has, _ in cells]
    arrows = [bool(set(title) & set("↑↓")) for title in METRICS.values()]
    assert marked == [arrow and row[key].value == best[key] for row in models.values()
                      for key, arrow in zip(METRICS, arrows, strict=True)]  # fmt: skip
    heads = list(parsed.find_all("button", type="button"))
    assert [text.replace("\xa0", " ") for _, text in heads] == ["model", *METRICS.values()]
    assert [has["title"] for has, _ in heads] == ["", *(MEANINGS[key] for key in METRICS)]
    assert len(list(parsed.find_all("th", **{"aria-sort": "none"}))) == 1 + len(METRICS)


def test_what_is_no_number_is_not_the_best() -> None:
    nothing, key = measure(float("nan")), "frechet_distance"  # the lowest is the best
    table = tables.of_models({"one": {key: nothing}, "two": {key: measure(2.0)}, "three": {key: measure(3.0)}})
    assert re.findall(r'<td data-value="(\w[\w.]*)" class="best">', table) == ["2.0"]
    assert "best" not in tables.of_models({"one": {key: nothing}})


def test_two_models_are_set_against_each_other_metric_by_metric(page: str) -> None:
    models = {name: dict(row) for name, row in example().models.items()}
    models["hard"]["sharpness"] = models["base"]["sharpness"]
    parsed = Parsed(tables.of_two("base", "hard", models))
    smalls = [text for _, text in parsed.find_all("small")]
    verdicts = {key: "better" if set(title) & set("↑↓") else "less" for key, title in METRICS.items()}
    verdicts |= {"kernel_distance": "not measured", "sharpness": "within chance"}
    found = [(models["base"][key], models["hard"][key]) for key in METRICS]
    assert smalls == [
        text
        for (key, verdict), (base, hard) in zip(verdicts.items(), found, strict=True)
        for text in (MEANINGS[key], interval(base), interval(hard), interval(hard - base), verdict)
    ]
    values = [shown(value) for a, b in found for value in (a.value, b.value, (b - a).value)]
    assert [text.removeprefix("+") for _, text in parsed.find_all("td")] == values
    assert [text for _, text in parsed.find_all("th", scope="col")] == ["", "base", "hard", "hard − base"]
    assert page.count('class="change"') == 1


@pytest.mark.parametrize(
    "values, title, verdict",
    [
        ((1, 0.5, 1.5), "a ↑", "better"),
        ((-1, -1.5, -0.5), "a ↑", "worse"),
        ((-1, -1.5, -0.5), "a ↓", "better"),
        ((1, 0.5, 1.5), "a ↓ (so)", "worse"),
        ((-1, -1.5, -0.5), "sharpness", "less"),
        ((0.5, -0.5, 1.5), "a ↑", "within chance"),
        ((0, 0, 0), "a ↑", "within chance"),
        ((1, float("nan"), 2), "a ↑", "not measured"),
    ],
)
def test_a_difference_says_what_its_interval_allows(values: tuple[float, ...], title: str, verdict: str) -> None:
    difference = Measure(np.array([values[0], *np.linspace(values[1], values[2], 50)]))
    assert tables._verdict(difference, title) == verdict
    assert ('class="bar"' in tables._bar(difference)) == (verdict != "not measured")


def test_differences_stand_in_a_table_of_their_own(page: str) -> None:
    parsed = Parsed(page)
    rows = [text for has, text in parsed.find_all("th", scope="row") if "data-value" in has]
    assert rows == [*MODELS, "hard − base", "hard − easy"]
    assert "Differences" not in report.page(small()._replace(differences={}))


def test_the_judges_opinion_stands_above_the_slider(page: str) -> None:
    judged = {"second_win_rate": Measure(np.array([0.887, 0.842, 0.932])), "third_win_rate": measure(0.8)}
    assert report._preferred("base", "hard", {"hard": judged}) == (
        "<p>Of a drawing by base and one by hard, from the same caption and seed, the judge prefers hard's in "
        "<b>89&nbsp;%</b> (84 to 93), the second judge in <b>80&nbsp;%</b> (77 to 83).</p>"
    )
    assert EVIL not in report._preferred("base", EVIL, {EVIL: judged})
    others = [("easy", "hard", {"hard": judged}), ("base", "photograph", {}), ("base", "hard", {"hard": {}})]
    assert [report._preferred(*each) for each in others] == ["", "", ""]
    assert page.index("the judge prefers hard's") < page.index('id="wipe"')


def test_the_slider_begins_with_what_is_to_be_compared(page: str) -> None:
    assert [text for _, text in Parsed(page).find_all("option", selected=None)] == ["base", "hard"]
    assert [text for _, text in Parsed(page).find_all("option")] == 2 * [*MODELS, "photograph"]


def test_names_and_captions_are_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = small()
    tags = {tag for tag, _, _ in Parsed(report.page(plain)).elements}
    (stage,) = plain.stages.values()
    monkeypatch.setitem(METRICS, "sharpness", EVIL)
    evil = plain._replace(
        head={EVIL: EVIL},
        lines={EVIL: EVIL},
        models={EVIL: plain.models["base"], "hard": plain.models["hard"]},
        differences={EVIL: plain.models["base"]},
        pictures={EVIL: plain.photographs, "hard": plain.photographs},
        captions=[EVIL] * report.COLUMNS,
        stages={EVIL: stage._replace(captions=[EVIL] * report.PAIRS)},
        compared=(EVIL, "hard"),
        people=[report.ConceptPerson(plain.photographs[0], [EVIL], {EVIL: plain.photographs[:1]})],
        measured=[EVIL],
    )
    parsed = Parsed(report.page(evil))
    assert len(list(parsed.find_all("script"))) == 1 and {tag for tag, _, _ in parsed.elements} | {"b"} == tags
    heads = [text for _, text in parsed.find_all("span", **{"class": "head"})]
    assert heads[: report.COLUMNS] == [EVIL] * report.COLUMNS
    alts = [has["alt"] for has, _ in parsed.find_all("img")]
    assert f"{EVIL}: {EVIL}" in alts and f"hard: {EVIL}" in alts and f"winner: 1.5 against −0.2: {EVIL}" in alts


@pytest.mark.parametrize(
    "left, expected",
    [
        ({"stages": {}}, ["compare", "change", "measures", "pictures", "people"]),
        ({"people": (), "measured": ()}, ["compare", "change", "measures", "pictures", "training", "pairs"]),
        ({"stages": {}, "people": ()}, ["compare", "change", "measures", "pictures"]),
        ({"stages": {}, "people": (), "compared": ("base", "photograph")}, ["compare", "measures", "pictures"]),
    ],
)
def test_parts_that_a_run_has_not_are_left_out(left: dict[str, Any], expected: list[str]) -> None:
    assert sections(report.page(small()._replace(**left))) == expected


def test_a_model_can_be_compared_with_the_photographs() -> None:
    page = report.page(small()._replace(stages={}, people=(), compared=("base", "photograph")))
    assert [text for _, text in Parsed(page).find_all("option", selected=None)] == ["base", "photograph"]
    words = [text for _, text in Parsed(page).find_all("dt")]  # the columns are explained in another place
    assert [word for word in words if word in METRICS.values()] == list(METRICS.values())


def drawn_curves(page: str) -> list[str]:
    """The SVG files of a page."""
    sources = [has["src"] or "" for has, _ in Parsed(page).find_all("img")]
    start = "data:image/svg+xml;base64,"
    return [base64.b64decode(source.removeprefix(start)).decode() for source in sources if source.startswith(start)]


def test_curves_say_where_the_heldout_loss_is_lowest(page: str) -> None:
    drawn = drawn_curves(page)
    assert [re.findall(r"lowest at (\d+)", svg) for svg in drawn] == [["20"], ["40"], ["60"]]
    assert all(f">{title}</text>" in svg for svg in drawn for title in curves.CURVES)


def test_the_same_run_has_the_same_page() -> None:
    given = small()
    assert report.page(given) == report.page(given)


def test_lowest_is_the_first_of_equals_and_needs_heldout_pairs() -> None:
    held = [{"step": step, "heldout/loss/dpo": loss} for step, loss in ((0, 0.7), (10, 0.5), (20, 0.5))]
    assert curves.step_of_lowest_loss(held) == 10
    assert curves.step_of_lowest_loss([{"step": 5, "heldout/loss/dpo": float("nan")}, *held[:1]]) == 0
    assert curves.step_of_lowest_loss([{"step": 1, "loss/dpo": 0.1}]) is None and curves.step_of_lowest_loss([]) is None


def test_the_winners_error_is_relative_to_the_references() -> None:
    log = [{"step": 1, "error/winner": 3.0, "error/winner_reference": 2.0}, {"step": 2, "error/winner": 3.0},
           {"step": 3, "error/winner": 0.0, "error/winner_reference": 0.0}]  # fmt: skip
    assert curves._points(log, "error/winner", "error/winner_reference") == [(1, 1.5), (3, 0.0)]


@pytest.mark.parametrize("log", [[], [{"step": 1, "loss/dpo": 0.6}, {"step": 2, "loss/dpo": 0.5}]])
def test_a_stage_without_heldout_points(log: list[dict[str, float]]) -> None:
    assert "lowest" not in curves.svg("easy", log)


@pytest.mark.parametrize(
    "side, kind, shown", [(64, "png", 128), (100, "png", 100), (256, "png", 256), (257, "jpeg", 0)]
)
def test_small_pictures_are_shown_pixel_by_pixel(side: int, kind: str, shown: int) -> None:
    image = RNG.uniform(-1, 1, (1, side, side - 1 if side == 257 else side, 3)).astype(np.float32)
    grid = report._grid({"base": image}, ["a caption"])
    ((has, _),) = Parsed(grid).find_all("img")
    source = has["src"] or ""
    assert source.startswith(f"data:image/{kind};base64,") and has.get("class") == ("small" if shown else None)
    if kind == "jpeg":  # of every pixel its colour
        assert [layer[1:3] for layer in Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).layer] == [
            (1, 1)
        ] * 3
    opened = Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))
    assert opened.size == (int(has["width"] or 0), int(has["height"] or 0)) == image.shape[2:0:-1]
    assert not shown or f"--least: {shown}px; --most: {shown}px" in grid
