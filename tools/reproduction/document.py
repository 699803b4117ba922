"""What the rows of all seeds say beside the paper's, as Markdown.

python -m tools.reproduction.document VARIANT FOLDER
"""

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hgdpo_jax.scoring import reproduction
from hgdpo_jax.scoring.bootstrap import Measure
from hgdpo_jax.scoring.comparison import title_of
from hgdpo_jax.scoring.reproduction import Paper, Samples
from hgdpo_jax.training import metrics
from hgdpo_jax.training.watchdog import watch
from tools.reproduction.rows import rows, too_fast

# The paper's column → our metrics of the same kind; the first that was measured stands for it.
NEAREST = {
    "P": ("preference_score",),
    "HPS": ("hps",),
    "IR": ("image_reward",),
    "AES": ("aesthetic",),
    "CLIP": ("clip_score",),
    "CI-Q": ("clip_iqa_quality", "second_score"),
    "CI-S": ("clip_iqa_sharpness",),
    "ATHEC": ("sharpness",),
    "hue": ("hue_distance",),
}
_SHOWN = ("faces_found", "second_win_rate", "third_win_rate", "face_kernel_distance", "kernel_distance",
          "frechet_distance", "preference_score", "second_score", "sharpness", "hue_distance")  # fmt: skip


def read(folder: Path, names: Mapping[str, str]) -> dict[str, dict[str, np.ndarray]]:
    """Row → metric → value and resamples of each seed, [s r], of the rows that all seeds have.

    Args:
        folder: of the reproduction.
        names: the end of a run as `evaluate --runs` takes it → its row.
    """
    per_seed: list[dict[str, dict[str, np.ndarray]]] = []
    for run in _runs(folder):
        parts = [reproduction.read_resamples([path]) for path in sorted(run.glob("rows/*/resamples.npz"))]
        drawn = {row.rpartition("/")[2]: metrics for part in parts for row, metrics in part.items()}
        per_seed.append({end: drawn[run.name + end] for end in names if run.name + end in drawn})
    found: dict[str, dict[str, np.ndarray]] = {}
    for end, name in names.items():
        if per_seed and all(end in seed for seed in per_seed):
            found[name] = {
                metric: np.concatenate([seed[end][metric] for seed in per_seed]) for metric in per_seed[0][end]
            }
    return found


def beside_known(folder: Path, known: Mapping[str, str], own: Mapping[str, str]) -> dict[str, dict[str, np.ndarray]]:
    """Rows of a part after some of another; none where none of its own was measured."""
    found = read(folder, own)
    return read(folder, known) | found if found else {}


def cell(samples: np.ndarray) -> str:
    """The mean over seeds, and the middle 95 % over seeds and prompts."""
    drawn = np.random.default_rng(0).integers(len(samples), size=(2000, len(samples)))
    column = np.random.default_rng(1).integers(1, samples.shape[1], size=2000)
    measure = Measure(np.concatenate([[samples[:, 0].mean()], samples[drawn, column[:, None]].mean(1)]))
    low, high = measure.interval
    return f"{measure.value:.3g} [{low:.3g}, {high:.3g}]"


def table(ours: Samples) -> list[str]:
    """A row for each of ours."""
    shown = [metric for metric in _SHOWN if metric in next(iter(ours.values()))]
    lines = ["| row | " + " | ".join(title_of(metric) for metric in shown) + " |", "|---" * (len(shown) + 1) + "|"]
    return lines + [
        f"| {name} | " + " | ".join(cell(row[metric]) for metric in shown) + " |" for name, row in ours.items()
    ]


def standing(ours: Samples, fid: str) -> dict[str, str]:
    """The paper's column → the metric that stands for it, of those that were measured; `fid` for FID."""
    measured = next(iter(ours.values()))
    found = {column: [metric for metric in metrics if metric in measured] for column, metrics in NEAREST.items()}
    return {"FID": fid} | {column: metrics[0] for column, metrics in found.items() if metrics}


def beside(paper: Paper, ours: Mapping[str, Mapping[str, np.ndarray]], stands: Mapping[str, str]) -> list[str]:
    """The paper's numbers, and ours, row by row."""
    titles = [f"{column}, paper | {title_of(metric).rstrip(' ↑↓')}" for column, metric in stands.items()]
    lines = ["| row | " + " | ".join(titles) + " |", "|---" * (2 * len(titles) + 1) + "|"]
    for name, numbers in paper.rows.items():
        if name in ours:
            theirs = [f"{numbers[column]:.4g}" if column in numbers else "–" for column in stands]
            own = [f"{ours[name][column][:, 0].mean():.4g}" for column in stands]
            cells = " | ".join(f"{a} | {b}" for a, b in zip(theirs, own, strict=True))
            lines.append(f"| {name} | {cells} |")
    return lines


def judged(paper: Paper, ours: Mapping[str, Mapping[str, np.ndarray]]) -> list[str]:
    """The statistic of each column, and the orders that must hold and do not."""
    lines = [
        "| column | pairs decided | in the same order | 95 % | p | τ-b | passes |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, column in reproduction.columns(paper, ours).items():
        low, high = column.interval
        lines.append(f"| {name} | {column.decided} | {column.share:.2f} | {low:.2f} to {high:.2f} | {column.p:.4f} | "
                     f"{column.tau:.2f} | {'yes' if column.passes else 'no'} |")  # fmt: skip
    orders = reproduction.must_hold(paper, ours)
    held = [order for order in orders if order.holds]
    lines += ["", f"Orders that must hold and can be measured: {len(held)} of {len(orders)} do. Those that do not:", ""]
    for order in orders:
        if not order.holds:
            barely = ", barely decided by the paper" if order.barely else ""
            lines.append(
                f"- {order.column}: {order.more} above {order.less} (in {order.share:.0%} of the draws){barely}"
            )
    return lines


def collapses(folder: Path, variant: str) -> list[str]:
    """After how many steps each objective gives its first alarm at ten times the rate, in each run; – where it gives
    none."""
    found = [f"| {name} | {' | '.join(_first_alarm(run / f'fast_{name}') for run in _runs(folder))} |"
             for name in too_fast(variant)]  # fmt: skip
    return [
        "| objective | " + " | ".join(run.name for run in _runs(folder)) + " |",
        "|---" * (len(_runs(folder)) + 1) + "|",
        *found,
    ]


def _runs(folder: Path) -> list[Path]:
    return sorted({path.parents[2] for path in folder.glob("*/rows/*/resamples.npz")})


def _first_alarm(stage: Path) -> str:
    if not stage.is_dir():
        return "not run"
    alarms = watch(metrics.read(stage / "logs")).alarms
    return f"{alarms[0][0]}: {alarms[0][1]}" if alarms else "–"


def drifts(folder: Path, names: Mapping[str, str]) -> list[str]:
    """How far the errors of held-out winners and losers moved from the reference's in training, in percent of it."""
    lines = ["| row | winner's error | loser's error |", "|---|---|---|"]
    for stage, name in names.items():
        logs = [metrics.read(run / stage / "logs") for run in _runs(folder) if (run / stage).is_dir()]
        looks = [[line for line in log if "heldout/error/winner_reference" in line][-1:] for log in logs]
        found = [_drift(look[0]) for look in looks if look]
        if found:
            winner, loser = np.mean(found, axis=0)
            lines.append(f"| {name} | {winner:+.0f} % | {loser:+.0f} % |")
    return lines


def _drift(look: Mapping[str, float]) -> list[float]:
    errors = (f"heldout/error/{side}" for side in ("winner", "loser"))
    return [100 * (look[error] / look[f"{error}_reference"] - 1) for error in errors]


def document(variant: str, folder: Path) -> str:
    """The page."""
    names = {part: {f":{row.drawn}": row.name for row in found} for part, found in rows(variant).items()}
    stages = dict(list(names["paper"].items())[:4])  # base, easy, normal, hard: drawn in every part
    people = {f"-people-{count}:hard": f"{count} people" for count in (8, 16, 32, 64)}
    paper, ours = reproduction.read_paper(), read(folder, names["paper"])
    seeds = len(_runs(folder))
    baselines, ablations = (beside_known(folder, stages, names[part]) for part in ("baselines", "ablations"))
    objectives = beside_known(folder, {":base": "base", ":normal": "normal, dpo"}, names["objectives"])
    lengths = beside_known(folder, {":hard": "hard"}, names["lengths"])
    fewer = beside_known(folder, {":hard": "all, 108"}, people)
    stage_of = {row.drawn: row.name for row in rows(variant)["objectives"]}
    measured = f"{seeds} training seed{'s' * (seeds > 1)}, {variant}, mean and 95 % over seeds and prompts"
    # Until all of its rows are measured there is nothing to set beside the paper.
    parts = [[f"## The paper's rows: {measured}"], table(ours)] if ours.keys() == set(names["paper"].values()) else []
    for fid in [m for m in ("fid", "frechet_distance", "face_kernel_distance") if parts and m in ours["base"]]:
        stands = standing(ours, fid)
        named = {name: {column: row[metric] for column, metric in stands.items()} for name, row in ours.items()}
        heading = f"## Beside the paper's numbers, {title_of(fid).rstrip(' ↑↓')} for FID"
        parts += [[heading], beside(paper, named, stands), judged(paper, named)]
    others = {
        "Baselines": baselines,
        "Ablations beyond the paper's": ablations,
        "Objectives, in the normal stage": objectives,
        "So many times the steps": lengths,
        "Fewer people to learn from, hard": fewer,
    }
    for heading, found in others.items():
        parts += [[f"## {heading}"], table(found)] if found else []
    if objectives:
        parts += [
            ["Errors of held-out pairs beside the reference's at the end:"],
            drifts(folder, {"stage2": "normal, dpo", **stage_of}),
            ["## Ten times the rate: the step of the first alarm, by seed, and why"],
            collapses(folder, variant),
        ]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


if __name__ == "__main__":
    print(document(sys.argv[1], Path(sys.argv[2])), end="")
