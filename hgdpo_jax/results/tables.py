"""The report's tables: measures with 95 % intervals, and what their differences are worth."""

import html
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from hgdpo_jax.scoring.bootstrap import Measure
from hgdpo_jax.scoring.comparison import Measures, meaning_of, title_of


def measured_titles(models: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Metric → title, of the metrics that were measured of some models, all alike."""
    measured = next(iter(models.values()))
    return {name: title_of(name) for name in measured if not name.endswith("_interval")}


def number(value: float, digits: int = 3) -> str:
    """A number with a proper minus."""
    return f"{value:.{digits}f}".replace("-", "−")


def _title(title: str) -> str:
    """Its arrow says what is better: ↑ more, ↓ less; it stays with the word before it."""
    return re.sub(" ([↑↓])", r"&nbsp;\1", html.escape(title))


def _interval(measure: Measure) -> str:
    return f"<small>[{', '.join(map(number, measure.interval))}]</small>"


def _cell(measure: Measure, best: bool = False) -> str:
    mark = ' class="best"' if best else ""
    return f'<td data-value="{measure.value}"{mark}>{number(measure.value)}{_interval(measure)}</td>'


def _verdict(difference: Measure, title: str) -> str:
    """What a difference is in words, which its 95 % interval allows."""
    low, high = difference.interval
    if not low * high > 0:
        return "within chance" if math.isfinite(low + high) else "not measured"
    if not set(title) & {"↑", "↓"}:
        return "more" if low > 0 else "less"
    return "better" if (low > 0) == ("↑" in title) else "worse"


def _difference(measure: Measure, title: str, more: str = "") -> str:
    verdict, sign = _verdict(measure, title), "+" if measure.value > 0 else ""
    return (
        f'<td data-value="{measure.value}" class="{verdict.split()[0]}">{sign}{number(measure.value)}'
        f"{_interval(measure)}{more}<small>{verdict}</small></td>"
    )


def _bar(measure: Measure) -> str:
    """The interval on a line in whose middle 0 is."""
    most = max(map(abs, measure.interval)) or 1.0
    low, high = (50 + 50 * end / most for end in measure.interval)
    return f'<i class="bar" style="--low: {low:.1f}%; --high: {high:.1f}%"></i>' if math.isfinite(low + high) else ""


def _sorted_table(first: str, titles: Mapping[str, str], rows: Mapping[str, Sequence[str]]) -> str:
    """A table whose headings sort its rows; those of metrics say what they are."""
    heads = {"": first, **titles}
    cells = "".join(
        f'<th scope="col" aria-sort="none"><button type="button" title="{html.escape(meaning_of(key) if key else "")}">'
        f"{_title(title)}</button></th>"
        for key, title in heads.items()
    )
    body = "".join(
        f'<tr><th scope="row" data-value="{place}">{html.escape(name)}</th>{"".join(row)}</tr>'
        for place, (name, row) in enumerate(rows.items())
    )
    return (
        f'<div class="scroll"><table class="sorted"><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def of_models(models: Mapping[str, Measures], not_measured: Sequence[str] = ()) -> str:
    """A row for each model; the best of each column is marked, the columns of what was not measured are empty."""
    titles, best = measured_titles(models), {}
    for key, title in titles.items():
        finite = [row[key].value for row in models.values() if math.isfinite(row[key].value)]
        if finite and ("↑" in title or "↓" in title):
            best[key] = max(finite) if "↑" in title else min(finite)
    empty = ["<td></td>"] * len(not_measured)
    rows = {
        name: [_cell(row[key], row[key].value == best.get(key)) for key in titles] + empty
        for name, row in models.items()
    }
    return _sorted_table("model", titles | {name: title_of(name) for name in not_measured}, rows)


def of_differences(differences: Mapping[str, Measures]) -> str:
    """A row for each difference of two models, with what it is worth."""
    titles = measured_titles(differences)
    rows = {
        name.replace(" - ", " − "): [_difference(row[key], title) for key, title in titles.items()]
        for name, row in differences.items()
    }
    return _sorted_table("difference", titles, rows)


def of_two(left: str, right: str, models: Mapping[str, Measures]) -> str:
    """Two models: each metric with its meaning, both measures and their difference."""
    rows = []
    for key, title in measured_titles(models).items():
        a, b = models[left][key], models[right][key]
        head = f'<th scope="row">{_title(title)}<small>{html.escape(meaning_of(key))}</small></th>'
        rows.append(f"<tr>{head}{_cell(a)}{_cell(b)}{_difference(b - a, title, _bar(b - a))}</tr>")
    names = [html.escape(name) for name in (left, right)]
    heads = "".join(f'<th scope="col">{head}</th>' for head in ("", *names, f"{names[1]} − {names[0]}"))
    return f'<table class="change"><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
