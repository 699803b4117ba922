"""The report: one HTML file with its pictures inside, which opens from disk.

report.html beside this module is the page's template; here are its contents.
"""

import base64
import html
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from hgdpo_jax.data.pairs import open_stages
from hgdpo_jax.diffusion.sampler import Sampler
from hgdpo_jax.pictures.write import jpeg, png, to_uint8
from hgdpo_jax.results import curves, tables
from hgdpo_jax.results.facts import PHOTOGRAPH
from hgdpo_jax.run.folder import pair_stages, stage_config
from hgdpo_jax.scoring.comparison import Measures, meaning_of
from hgdpo_jax.training import metrics

COLUMNS = 10
PAIRS = 8
PEOPLE = 3
TEMPLATE = Path(__file__).with_name("report.html")
_SMALL = 256  # pixels a side, up to which a picture is shown pixel by pixel
_THUMBNAIL = 128  # px on the screen, about
_CHANGE_TEXT = (
    "↑ more is better, ↓ less is better. In brackets and as a bar around 0: 95&nbsp;% intervals, from these people "
    "alone. An interval that holds 0 is within chance; another seed of the training can move a measure by more."
)
_MODELS_TEXT = (
    "In brackets: 95&nbsp;% intervals. The best of each column with an arrow is marked. Click a heading to sort."
)
_DIFFERENCES_TEXT = (
    "Both models drew the same captions from the same seeds, so these intervals are narrower than theirs suggest."
)
_PICTURES_TEXT = (
    "A column has one prompt and one seed. Click to enlarge; arrow keys go on to the next picture or model."
)
_CURVES_TEXT = (
    "Line: training pairs. Points: held-out pairs, at noise and timesteps that stay the same. The dashed line marks "
    "their lowest loss; after it the stage learns what holds for its training pairs only."
)
_PEOPLE_TEXT = (
    "A photograph, and the same person drawn with an adapter. Identity distance: from a drawing's face to that of its "
    "own person, the mean over people ± its standard error. Nearer: by how much that is less than to another person; "
    "0 is no likeness. Change: how much farther than with base."
)
_PAIRS_TEXT = (
    "Held-out pairs, of which no stage has learnt. The winner is what a stage learns to prefer to the loser; above "
    "each pair are the scores that the scorer gave to winner and loser."
)
Pictures = Float[np.ndarray, "n H W 3"]


class Stage(NamedTuple):
    """A finished stage: its log, and some held-out pairs with their scores (winner's, loser's)."""

    log: list[dict[str, float]]
    captions: list[str]
    winners: Pictures
    losers: Pictures
    scores: list[tuple[float, float]]


class ConceptPerson(NamedTuple):
    """A concept photograph, and what each model drew of the person for some prompts."""

    photograph: Float[np.ndarray, "H W 3"]
    prompts: Sequence[str]
    drawn: Mapping[str, Pictures]


class Report(NamedTuple):
    """The contents of a report.

    Attributes:
        head: title → fact about the evaluation.
        lines: model → what it is; PHOTOGRAPH → what they are.
        models: model → metric → measure.
        differences: `a - b` → metric → measure.
        pictures: model → images in [-1, 1] of the same prompts and seeds; `captions` are theirs, `photographs` the
            originals, if there are any.
        stages: stages in order, under the names of their models.
        compared: the two rows of pictures that the report begins with.
        people: drawings of some people by models with an adapter; `measured` says how alike they are, in words.
        not_measured: names of scorers whose weights were not given.
    """

    head: Mapping[str, str]
    lines: Mapping[str, str]
    models: Mapping[str, Measures]
    differences: Mapping[str, Measures]
    pictures: Mapping[str, Pictures]
    captions: Sequence[str]
    photographs: Pictures | None
    stages: Mapping[str, Stage]
    compared: tuple[str, str]
    people: Sequence[ConceptPerson] = ()
    measured: Sequence[str] = ()
    not_measured: Sequence[str] = ()


def read_stage(workdir: Path, name: str, sampler: Sampler) -> Stage:
    """Reads a finished stage."""
    source = open_stages(workdir, pair_stages(stage_config(workdir, name))).sources["heldout"][0]
    rows = [source[i] for i in range(min(PAIRS, len(source)))]
    latents = {role: np.stack([row[role].astype(np.float32) for row in rows]) for role in ("winner", "loser")}
    return Stage(
        log=metrics.read(workdir / name / "logs"),
        captions=[row["caption"].decode() for row in rows],
        winners=sampler.decode(latents["winner"], "decode"),
        losers=sampler.decode(latents["loser"], "decode"),
        scores=[(float(row["winner_score"]), float(row["loser_score"])) for row in rows],
    )


def _data(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _section(identifier: str, title: str, *parts: str) -> str:
    return f'<section id="{identifier}"><h2>{title}</h2>{"".join(parts)}</section>'


def _words(words: Mapping[str, str]) -> str:
    """Words, and what they mean or are."""
    each = "".join(
        f"<div><dt>{html.escape(word)}</dt> <dd>{html.escape(said)}</dd></div>" for word, said in words.items()
    )
    return f'<dl class="words">{each}</dl>'


def _preferred(left: str, right: str, models: Mapping[str, Measures]) -> str:
    """What the judges say of two models, of which the first is base, in a sentence; empty without judges."""
    shares: list[str] = []
    for key, judge in (("second_win_rate", "the judge"), ("third_win_rate", "the second judge")):
        if left == "base" and key in models.get(right, {}):
            share, (low, high) = models[right][key].value, models[right][key].interval
            verb = "" if shares else f"prefers {html.escape(right)}'s "
            shares.append(f"{judge} {verb}in <b>{100 * share:.0f}&nbsp;%</b> ({100 * low:.0f} to {100 * high:.0f})")
    both = f"Of a drawing by base and one by {html.escape(right)}, from the same caption and seed"
    return f"<p>{both}, {', '.join(shares)}.</p>" if shares else ""


def _is_small(image: Float[np.ndarray, "H W 3"]) -> bool:
    return max(image.shape[:2]) <= _SMALL


def _picture(image: Float[np.ndarray, "H W 3"], label: str) -> str:
    """An image in [-1, 1] that is enlarged by a click; small ones lose nothing."""
    height, width, _ = image.shape
    small = _is_small(image)
    source = _data("png", png(to_uint8(image))) if small else _data("jpeg", jpeg(to_uint8(image), fine=True))
    size = f'width="{width}" height="{height}"{" class=small" if small else ""}'
    return f'<button type="button" class="cell"><img {size} alt="{html.escape(label)}" src="{source}"></button>'


def _grid(rows: Mapping[str, Pictures], heads: Sequence[str]) -> str:
    """Labelled rows of pictures of one size under their captions."""
    width = next(iter(rows.values())).shape[2]
    least, most = f"{_THUMBNAIL}px", f"{2 * _THUMBNAIL}px"
    if _is_small(next(iter(rows.values()))[0]):
        least = most = f"{width * max(1, _THUMBNAIL // width)}px"  # a whole number of times
    cells = ['<span class="name"></span>']
    cells += [f'<span class="head" title="{html.escape(head)}">{html.escape(head)}</span>' for head in heads]
    for name, pictures in rows.items():
        cells.append(f'<span class="name">{html.escape(name)}</span>')
        cells += [_picture(picture, f"{name}: {head}") for picture, head in zip(pictures, heads, strict=True)]
    style = f"--columns: {len(heads)}; --least: {least}; --most: {most}"
    return f'<div class="scroll"><div class="grid" style="{style}">{"".join(cells)}</div></div>'


def _options(lines: Mapping[str, str], chosen: str) -> str:
    return "".join(
        f'<option value="{number}" title="{html.escape(line)}"{" selected" if name == chosen else ""}>'
        f"{html.escape(name)}</option>"
        for number, (name, line) in enumerate(lines.items())
    )


def _curves(name: str, log: Sequence[Mapping[str, float]]) -> str:
    label = html.escape(f"{name}: {', '.join(curves.CURVES)} over steps")
    source = _data("svg+xml", curves.svg(name, log).encode())
    return f'<div><h3>{html.escape(name)}</h3><img alt="{label}" src="{source}"></div>'


def page(report: Report) -> str:
    """The HTML of a report. A part that a run does not have is left out."""
    rows, (left, right) = dict(report.pictures), report.compared
    if report.photographs is not None:
        rows[PHOTOGRAPH] = report.photographs
    lines = {name: report.lines.get(name, "") for name in rows}
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=f"{html.escape(right)} against {html.escape(left)}",
        head=_words(report.head),
        kind="compare small" if _is_small(report.pictures[left][0]) else "compare",
        preferred=_preferred(left, right, report.models),
        left=_options(lines, left),
        right=_options(lines, right),
        sections="\n".join(
            [
                *_measures(report),
                _section("pictures", "Pictures", _note(_PICTURES_TEXT), _grid(rows, report.captions)),
                *_training(report),
            ]
        ),
    )


def _note(text: str) -> str:
    return f'<p class="note">{text}</p>'


def _measures(report: Report) -> Iterator[str]:
    left, right = report.compared
    two = {left, right} <= report.models.keys()
    if two:
        yield _section("change", "What changed", _note(_CHANGE_TEXT), tables.of_two(left, right, report.models))
    words = {title: meaning_of(key) for key, title in tables.measured_titles(report.models).items()}
    parts = [_words(report.lines), tables.of_models(report.models, report.not_measured)]
    absent = (
        f" Empty columns: no weights were given of {', '.join(report.not_measured)}." if report.not_measured else ""
    )
    parts += [_note(_MODELS_TEXT + absent), "" if two else _words(words)]
    if report.differences:
        parts += ["<h3>Differences</h3>", tables.of_differences(report.differences), _note(_DIFFERENCES_TEXT)]
    yield _section("measures", "All models", *parts)


def _training(report: Report) -> Iterator[str]:
    if report.stages:
        words = _words({title: curve.meaning for title, curve in curves.CURVES.items()})
        drawn = "".join(_curves(name, stage.log) for name, stage in report.stages.items())
        yield _section("training", "Training", words, _note(_CURVES_TEXT), f'<div class="curves">{drawn}</div>')
    if report.people:
        measures = [f"<p>{html.escape(line)}</p>" for line in report.measured]
        yield _section("people", "People", _note(_PEOPLE_TEXT), *measures, *map(_person, report.people))
    if report.stages:
        pairs = (_pairs(name, stage) for name, stage in report.stages.items())
        yield _section("pairs", "Pairs", _note(_PAIRS_TEXT), *pairs)


def _person(person: ConceptPerson) -> str:
    """The photograph stands at the head of each model's row."""
    rows = {name: np.concatenate([person.photograph[None], drawn]) for name, drawn in person.drawn.items()}
    return _grid(rows, ["photograph", *person.prompts])


def _pairs(name: str, stage: Stage) -> str:
    heads = [
        f"{tables.number(winner, 1)} against {tables.number(loser, 1)}: {caption}"
        for (winner, loser), caption in zip(stage.scores, stage.captions, strict=True)
    ]
    return f"<h3>{html.escape(name)}</h3>{_grid({'winner': stage.winners, 'loser': stage.losers}, heads)}"
