"""The curves of a stage's training, as they stand in the report."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine


class Curve(NamedTuple):
    """A row of curves: the key of what it shows, of what that is divided by, and what it means."""

    key: str
    divisor: str | None
    meaning: str


CURVES = {
    "DPO loss": Curve("loss/dpo", None, "what training minimises: 0.693 where the stage prefers neither picture"),
    "margin z": Curve(
        "dpo/margin",
        None,
        "how much more the stage prefers the winner to the loser than what it began with; 0: as much",
    ),
    "implicit accuracy": Curve("dpo/accuracy", None, "share of pairs with a margin above 0; 0.5 is chance"),
    "winner's error / reference's": Curve(
        "error/winner",
        "error/winner_reference",
        "far above 1 the stage unlearns the winners, for all that it prefers them",
    ),
}
# Black follows the page, which may be dark; nothing else in a figure is black.
_STYLE = (
    "<style>svg { color: #1c1c20 } @media (prefers-color-scheme: dark) { svg { color: #e6e6ea } } "
    "text { fill: currentColor }</style>"
)


def _points(log: Sequence[Mapping[str, float]], key: str, divisor: str | None = None) -> list[tuple[float, float]]:
    """Step and finite value of each line of a log that has `key`; where there is a `divisor`, divided by that."""
    lines = [line for line in log if {key, divisor or key} <= line.keys()]
    points = [(line["step"], line[key] / max(line[divisor], 1e-12) if divisor else line[key]) for line in lines]
    return [(step, value) for step, value in points if math.isfinite(value)]


def step_of_lowest_loss(log: Sequence[Mapping[str, float]]) -> float | None:
    """The first step at which the loss of the held-out pairs is lowest; None where they were not measured."""
    step, _ = min(_points(log, "heldout/loss/dpo"), key=lambda point: point[1], default=(None, 0.0))
    return step


def svg(name: str, log: Sequence[Mapping[str, float]]) -> str:
    """The curves of a stage over its steps, as SVG: sharp at any size, and its text remains text. The same log gives
    the same bytes."""
    figure = Figure(figsize=(3.4, 1.75 * len(CURVES)), layout=ConstrainedLayoutEngine(h_pad=0.08))
    axes = list(figure.subplots(len(CURVES), sharex=True))
    for axis, (title, curve) in zip(axes, CURVES.items(), strict=True):
        _draw(axis, title, curve, log)
    if axes[0].lines:
        axes[0].legend(fontsize=8, framealpha=0)
    step = step_of_lowest_loss(log)
    if step is not None:
        _mark(axes, step)
    axes[-1].set_xlabel("step", fontsize=8)
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return file.getvalue().replace("#000000", "currentColor").replace("<defs>", f"{_STYLE}<defs>", 1)


def _draw(axis: Axes, title: str, curve: Curve, log: Sequence[Mapping[str, float]]) -> None:
    for prefix, style, label in (("", "-", "training pairs"), ("heldout/", "o", "held-out pairs")):
        points = _points(log, prefix + curve.key, curve.divisor and prefix + curve.divisor)
        if points:
            axis.plot(*zip(*points, strict=True), style, markersize=4, linewidth=1.2, label=label)
    if curve.divisor:
        axis.axhline(1.0, color="gray", linewidth=0.8)
    axis.set_title(title, fontsize=9, loc="left")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8, labelbottom=True)


def _mark(axes: Sequence[Axes], step: float) -> None:
    """A dashed line through all curves at the step of the lowest held-out loss."""
    for axis in axes:
        axis.axvline(step, color="gray", linestyle="--", linewidth=1)
    bottom, top = axes[0].get_ylim()
    axes[0].set_ylim(bottom, top + 0.2 * (top - bottom))  # for the label
    side: Literal["left", "right"] = "left" if step <= np.mean(axes[0].get_xlim()) else "right"
    place = (4 if side == "left" else -4, -2)
    axes[0].annotate(
        f"lowest at {step}", (step, 1), xycoords=axes[0].get_xaxis_transform(), xytext=place,
        textcoords="offset points", ha=side, va="top", fontsize=8, color="gray",
    )  # fmt: skip
