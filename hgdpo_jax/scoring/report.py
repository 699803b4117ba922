"""The report: one HTML file with its pictures inside, which opens from disk."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Float

from hgdpo_jax.data.pairs import open_stage
from hgdpo_jax.diffusion.painter import Painter
from hgdpo_jax.scoring.pictures import png, to_uint8
from hgdpo_jax.training import metrics

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

COLUMNS = 10
PAIRS = 8
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .3rem .8rem; text-align: right }
th { border-bottom: 2px solid #444 } td:first-child, th:first-child { text-align: left }
tr:nth-child(even) td { background: #f4f4f4 } figure { margin: 1rem 0 } figcaption { color: #666; font-size: 13px }
.grid { display: grid; gap: 3px; align-items: center } .grid img { width: 100%; display: block }
.grid span { font-size: 12px; color: #555; line-height: 1.25 } h2 { margin-top: 2.5rem }
"""
Pictures = Float[np.ndarray, "n H W 3"]


class Stage(NamedTuple):
    """What the report shows of a stage: its log, and some held-out pairs."""

    log: list[dict[str, float]]
    captions: list[str]
    winners: Pictures
    losers: Pictures
    scores: list[tuple[float, float]]


class Person(NamedTuple):
    """A concept photograph, and what each model drew of the person for some prompts."""

    photograph: Float[np.ndarray, "H W 3"]
    prompts: Sequence[str]
    drawn: Mapping[str, Pictures]

    def rows(self) -> dict[str, Pictures]:
        """The photograph stands at the head of each model's row."""
        return {name: np.concatenate([self.photograph[None], pictures]) for name, pictures in self.drawn.items()}


def stage(workdir: Path, name: str, painter: Painter) -> Stage:
    """Reads a finished stage."""
    source = open_stage(workdir, name).sources["heldout"][0]
    rows = [source[i] for i in range(min(PAIRS, len(source)))]
    latents = {role: np.stack([row[role].astype(np.float32) for row in rows]) for role in ("winner", "loser")}
    return Stage(
        log=metrics.read(workdir / name / "logs"),
        captions=[row["caption"].decode() for row in rows],
        winners=painter.decode(latents["winner"], "decode"),
        losers=painter.decode(latents["loser"], "decode"),
        scores=[(float(row["winner_score"]), float(row["loser_score"])) for row in rows],
    )


def _tag(data: bytes, label: str) -> str:
    return f'<img src="data:image/png;base64,{base64.b64encode(data).decode()}" alt="{html.escape(label)}">'


def _curves(stages: Sequence[tuple[str, Stage]]) -> str:
    """Loss, margin and accuracy of each stage over its steps, training and held-out pairs."""
    rows = (("loss/dpo", "DPO loss"), ("dpo/margin", "margin z"), ("dpo/accuracy", "implicit accuracy"))
    figure, axes = pyplot.subplots(len(rows), len(stages), figsize=(3.6 * len(stages), 6), squeeze=False)
    for column, (name, found) in enumerate(stages):
        for row, (key, title) in enumerate(rows):
            axis = axes[row][column]
            for prefix, style in (("", "-"), ("heldout/", "o--")):
                points = [(v["step"], v[prefix + key]) for v in found.log if prefix + key in v]
                if points:
                    axis.plot(*zip(*points, strict=True), style, markersize=3, label=prefix.rstrip("/") or "train")
            axis.grid(alpha=0.3)
            axis.set_title(f"{name}: {title}", fontsize=9)
            axis.tick_params(labelsize=8)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    pyplot.close(figure)
    return _tag(file.getvalue(), "loss curves")


def _rows(rows: Mapping[str, Pictures], heads: Sequence[str]) -> str:
    """Labelled rows of pictures under their captions."""
    cells = ["<span></span>", *(f"<span>{html.escape(head)}</span>" for head in heads)]
    for name, pictures in rows.items():
        cells.append(f"<span><b>{html.escape(name)}</b></span>")
        cells += [
            _tag(png(to_uint8(picture)), f"{name}: {head}") for picture, head in zip(pictures, heads, strict=False)
        ]
    return f'<div class="grid" style="grid-template-columns: 5rem repeat({len(heads)}, 1fr)">{"".join(cells)}</div>'


def page(
    models: Mapping[str, Mapping[str, float]],
    titles: Mapping[str, str],
    pictures: Mapping[str, Pictures],
    captions: Sequence[str],
    photographs: Pictures,
    stages: Sequence[tuple[str, Stage]],
    people: Sequence[Person] = (),
    distances: Mapping[str, Mapping[str, float]] | None = None,
) -> str:
    """The HTML of a report.

    Args:
        models: model → metric → value; `titles` names the metrics.
        pictures: model → images of the same prompts and seeds; `captions` are theirs, `photographs` the originals.
        stages: stages in order.
        people: what models with an adapter drew of some people; `distances` are the measures of each model.
    """
    head = "".join(f"<th>{html.escape(title)}</th>" for title in titles.values())
    body = "".join(
        f"<tr><td>{name}</td>{''.join(f'<td>{row[key]:.3f}</td>' for key in titles)}</tr>"
        for name, row in models.items()
    )
    sections: list[Any] = [
        "<h1>HG-DPO</h1>",
        f"<table><tr><th></th>{head}</tr>{body}</table>",
        "<h2>The same prompts and seeds</h2>",
        _rows({**pictures, "photograph": photographs}, captions),
        "<h2>Training</h2>",
        f"<figure>{_curves(stages)}<figcaption>Training pairs (line) and held-out pairs at fixed noise and timesteps "
        "(points).</figcaption></figure>" if stages else "",
    ]  # fmt: skip
    if people:
        sections.append("<h2>People: a photograph, and the same person drawn with an adapter</h2>")
        for name, row in (distances or {}).items():
            sections.append(
                f"<p>{name}: identity distance {row['identity_distance']:.3f} ± {row['identity_standard_error']:.3f}, "
                f"to another person {row['distance_to_another_person']:.3f}</p>"
            )
        sections += [_rows(person.rows(), ["photograph", *person.prompts]) for person in people]
    for name, found in stages:
        heads = [f"{w:.1f} against {v:.1f}" for w, v in found.scores]
        sections.append(f"<h2>Held-out pairs of the {name} stage</h2><p>Preference scores of winner and loser.</p>")
        sections.append(_rows({"winner": found.winners, "loser": found.losers}, heads))
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>HG-DPO report</title>'
        f"<style>{_STYLE}</style>{''.join(sections)}</html>\n"
    )
