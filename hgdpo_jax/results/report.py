"""The report: one HTML file with its pictures inside, which opens from disk.

report.html beside this module is the page's template; here are its contents.
"""

import base64
import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from hgdpo_jax.data.pairs import open_stage
from hgdpo_jax.diffusion.sampler import Sampler
from hgdpo_jax.pictures.write import jpeg, png, to_uint8
from hgdpo_jax.run.folder import stage_config
from hgdpo_jax.scoring.bootstrap import Measure
from hgdpo_jax.scoring.comparison import METRICS, Measures
from hgdpo_jax.training import metrics

COLUMNS = 10
PAIRS = 8
PEOPLE = 3
TEMPLATE = Path(__file__).with_name("report.html")
_SMALL = 256  # pixels a side, up to which a picture is shown pixel by pixel
_THUMBNAIL = 128  # px on the screen, about
# A row of curves → the key of what it shows, and of what that is divided by.
_CURVES = {
    "DPO loss": ("loss/dpo", None),
    "margin z": ("dpo/margin", None),
    "implicit accuracy": ("dpo/accuracy", None),
    "winner's error / reference's": ("error/winner", "error/winner_reference"),
}
_CURVES_TEXT = (
    "Training pairs (line) and held-out pairs at fixed noise and timesteps (points). The dashed line marks the lowest "
    "loss of the held-out pairs: from there on the two part, and the policy learns what holds for its training pairs "
    "only. At the last step, they have not parted yet. A policy whose winner's error is above the reference's (1) "
    "unlearns the winners."
)
# Black follows the page, which may be dark; nothing else in a figure is black.
_CURVES_STYLE = (
    "<style>svg { color: #1c1c20 } @media (prefers-color-scheme: dark) { svg { color: #e6e6ea } } "
    "text { fill: currentColor }</style>"
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
        models: model → metric → measure.
        pictures: model → images in [-1, 1] of the same prompts and seeds; `captions` are theirs, `photographs` the
            originals.
        stages: stages in order, under the names of their models.
        compared: the two rows of pictures that the slider begins with.
        people: drawings of some people by models with an adapter; `measured` says how alike they are, in words.
    """

    models: Mapping[str, Measures]
    pictures: Mapping[str, Pictures]
    captions: Sequence[str]
    photographs: Pictures
    stages: Mapping[str, Stage]
    compared: tuple[str, str]
    people: Sequence[ConceptPerson] = ()
    measured: Sequence[str] = ()


def read_stage(workdir: Path, name: str, sampler: Sampler) -> Stage:
    """Reads a finished stage."""
    source = open_stage(workdir, stage_config(workdir, name).train.pairs or name).sources["heldout"][0]
    rows = [source[i] for i in range(min(PAIRS, len(source)))]
    latents = {role: np.stack([row[role].astype(np.float32) for row in rows]) for role in ("winner", "loser")}
    return Stage(
        log=metrics.read(workdir / name / "logs"),
        captions=[row["caption"].decode() for row in rows],
        winners=sampler.decode(latents["winner"], "decode"),
        losers=sampler.decode(latents["loser"], "decode"),
        scores=[(float(row["winner_score"]), float(row["loser_score"])) for row in rows],
    )


def measured_titles(models: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Metric → title, of the metrics that were measured of some models, all alike."""
    measured = next(iter(models.values()))
    return {name: title for name, title in METRICS.items() if name in measured}


def _data(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _number(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}".replace("-", "−")


def _section(identifier: str, title: str, *parts: str) -> str:
    return f'<section id="{identifier}"><h2>{title}</h2>{"".join(parts)}</section>'


def _heading(title: str) -> str:
    unbroken = re.sub(" ([↑↓])", r"&nbsp;\1", html.escape(title))
    return f'<th scope="col" aria-sort="none"><button type="button">{unbroken}</button></th>'


def _cell(measure: Measure, best: bool) -> str:
    mark, interval = ' class="best"' if best else "", ", ".join(map(_number, measure.interval))
    return f'<td data-value="{measure.value}"{mark}>{_number(measure.value)}<small>[{interval}]</small></td>'


def _table(models: Mapping[str, Measures]) -> str:
    """A row for each model. The arrow in a title says what is best: ↑ the largest value, ↓ the smallest."""
    titles, best = measured_titles(models), {}
    for key, title in titles.items():
        finite = [row[key].value for row in models.values() if math.isfinite(row[key].value)]
        if finite and ("↑" in title or "↓" in title):
            best[key] = max(finite) if "↑" in title else min(finite)
    rows = [
        f'<tr><th scope="row" data-value="{number}">{html.escape(name)}</th>'
        + "".join(_cell(row[key], row[key].value == best.get(key)) for key in titles)
        + "</tr>"
        for number, (name, row) in enumerate(models.items())
    ]
    heads = "".join(map(_heading, ("model", *titles.values())))
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _picture(image: Float[np.ndarray, "H W 3"], label: str) -> str:
    """An image in [-1, 1] that is enlarged by a click; small ones lose nothing."""
    height, width, _ = image.shape
    small = max(height, width) <= _SMALL
    source = _data("png", png(to_uint8(image))) if small else _data("jpeg", jpeg(to_uint8(image)))
    size = f'width="{width}" height="{height}"{" class=small" if small else ""}'
    return f'<button type="button" class="cell"><img {size} alt="{html.escape(label)}" src="{source}"></button>'


def _grid(rows: Mapping[str, Pictures], heads: Sequence[str]) -> str:
    """Labelled rows of pictures of one size under their captions."""
    height, width = next(iter(rows.values())).shape[1:3]
    least, most = f"{_THUMBNAIL}px", f"{2 * _THUMBNAIL}px"
    if max(height, width) <= _SMALL:
        least = most = f"{width * max(1, _THUMBNAIL // width)}px"  # a whole number of times
    cells = ['<span class="name"></span>']
    cells += [f'<span class="head" title="{html.escape(head)}">{html.escape(head)}</span>' for head in heads]
    for name, pictures in rows.items():
        cells.append(f'<span class="name">{html.escape(name)}</span>')
        cells += [_picture(picture, f"{name}: {head}") for picture, head in zip(pictures, heads, strict=True)]
    style = f"--columns: {len(heads)}; --least: {least}; --most: {most}"
    return f'<div class="scroll"><div class="grid" style="{style}">{"".join(cells)}</div></div>'


def _points(log: Sequence[Mapping[str, float]], key: str, divisor: str | None = None) -> list[tuple[float, float]]:
    """Step and finite value of each line of a log that has `key`; where there is a `divisor`, divided by that."""
    lines = [line for line in log if {key, divisor or key} <= line.keys()]
    points = [(line["step"], line[key] / max(line[divisor], 1e-12) if divisor else line[key]) for line in lines]
    return [(step, value) for step, value in points if math.isfinite(value)]


def step_of_lowest_loss(log: Sequence[Mapping[str, float]]) -> float | None:
    """The first step at which the loss of the held-out pairs is lowest; None where they were not measured."""
    step, _ = min(_points(log, "heldout/loss/dpo"), key=lambda point: point[1], default=(None, 0.0))
    return step


def _curves(name: str, log: Sequence[Mapping[str, float]]) -> str:
    """The curves of a stage over its steps, as SVG: sharp at any size, and its text remains text."""
    figure = Figure(figsize=(4.2, 2.1 * len(_CURVES)), layout=ConstrainedLayoutEngine(h_pad=0.08))
    axes = figure.subplots(len(_CURVES), sharex=True)
    for axis, (title, (key, divisor)) in zip(axes, _CURVES.items(), strict=True):
        for prefix, style, label in (("", "-", "training pairs"), ("heldout/", "o", "held-out pairs")):
            points = _points(log, prefix + key, divisor and prefix + divisor)
            if points:
                axis.plot(*zip(*points, strict=True), style, markersize=4, linewidth=1.2, label=label)
        if divisor:
            axis.axhline(1.0, color="gray", linewidth=0.8)
        axis.set_title(title, fontsize=9, loc="left")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8, labelbottom=True)
    if axes[0].lines:
        axes[0].legend(fontsize=8, framealpha=0)
    if (step := step_of_lowest_loss(log)) is not None:
        for axis in axes:
            axis.axvline(step, color="gray", linestyle="--", linewidth=1)
        bottom, top = axes[0].get_ylim()
        axes[0].set_ylim(bottom, top + 0.2 * (top - bottom))  # for the label
        side = "left" if step <= np.mean(axes[0].get_xlim()) else "right"
        place = {"xycoords": axes[0].get_xaxis_transform(), "xytext": (4 if side == "left" else -4, -2)}
        axes[0].annotate(f"lowest at {step}", (step, 1), **place, textcoords="offset points", ha=side, va="top",
                         fontsize=8, color="gray")  # fmt: skip
    axes[-1].set_xlabel("step", fontsize=8)
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):  # the same bytes from the same log
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    drawn = file.getvalue().replace("#000000", "currentColor").replace("<defs>", f"{_CURVES_STYLE}<defs>", 1)
    label = html.escape(f"{name}: {', '.join(_CURVES)} over steps")
    return f'<div><h3>{html.escape(name)}</h3><img alt="{label}" src="{_data("svg+xml", drawn.encode())}"></div>'


def _options(names: Sequence[str], chosen: str) -> str:
    return "".join(
        f'<option value="{number}"{" selected" if name == chosen else ""}>{html.escape(name)}</option>'
        for number, name in enumerate(names)
    )


def page(report: Report) -> str:
    """The HTML of a report. A part that a run does not have is left out."""
    rows = {**report.pictures, "photograph": report.photographs}
    sections = []
    if report.stages:
        curves = "".join(_curves(name, stage.log) for name, stage in report.stages.items())
        caption = f'<figcaption class="note">{_CURVES_TEXT}</figcaption>'
        figure = f'<figure><div class="curves">{curves}</div>{caption}</figure>'
        sections.append(_section("training", "Training", figure))
    if report.people:
        note = '<p class="note">A photograph, and the same person drawn with an adapter.</p>'
        measures = [f"<p>{html.escape(line)}</p>" for line in report.measured]
        sections.append(_section("people", "People", note, *measures, *map(_person, report.people)))
    if report.stages:
        note = '<p class="note">Held-out pairs with the preference scores of winner and loser.</p>'
        pairs = (_pairs(name, stage) for name, stage in report.stages.items())
        sections.append(_section("pairs", "Pairs", note, *pairs))
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        table=_table(report.models),
        left=_options(list(rows), report.compared[0]),
        right=_options(list(rows), report.compared[1]),
        pictures=_grid(rows, report.captions),
        sections="\n".join(sections),
    )


def _person(person: ConceptPerson) -> str:
    """The photograph stands at the head of each model's row."""
    rows = {name: np.concatenate([person.photograph[None], drawn]) for name, drawn in person.drawn.items()}
    return _grid(rows, ["photograph", *person.prompts])


def _pairs(name: str, stage: Stage) -> str:
    heads = [
        f"{_number(winner, 1)} against {_number(loser, 1)}: {caption}"
        for (winner, loser), caption in zip(stage.scores, stage.captions, strict=True)
    ]
    return f"<h3>{html.escape(name)}</h3>{_grid({'winner': stage.winners, 'loser': stage.losers}, heads)}"
