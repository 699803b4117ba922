"""Tries a report in headless Chromium: reads, sorts, wipes, enlarges, on a desktop and a phone; listens for requests.

    python -m tests.browser.report [W/report.html]

Without a file the page of tests/results/test_report.py is tried. Chromium comes from the system's packages, see
chromium.py.
"""

import sys
import tempfile
import time
from pathlib import Path

from hgdpo_jax.results import report
from tests.browser.chromium import DESKTOP, PHONE, Failures, Page, chromium, layout, requests
from tests.results.test_report import example


def table(page: Page, failures: Failures) -> None:
    """Every column of every table of models or differences sorts both ways, by mouse and by key."""
    for number in range(page.value("document.querySelectorAll('table.sorted').length")):
        _sorts(page, failures, f"document.querySelectorAll('table.sorted')[{number}]")


def _sorts(page: Page, failures: Failures, element: str) -> None:
    cells = f"[...{element}.tBodies[0].rows].map(r => r.cells[{{}}].dataset.value)"
    heads = page.value(f"[...{element}.querySelectorAll('thead th')].map(head => head.textContent)")
    for column, head in enumerate(heads):
        button = f"{element}.querySelectorAll('thead button')[{column}]"
        state = f"{element}.querySelectorAll('thead th')[{column}].ariaSort"
        first = "descending" if "↑" in head else "ascending"
        for order in (first, "ascending" if first == "descending" else "descending"):
            if order == first:
                page.click(button)
            else:
                page.value(f"{button}.focus()")
                page.press("Enter")
            values = [float(value) for value in page.value(cells.format(column))]
            numbers = [value for value in values if value == value]  # the others are last
            holds = (
                repr(values[: len(numbers)]) == repr(sorted(numbers, reverse=order == "descending"))
                and page.value(state) == order
            )
            failures.check(f"table: {heads[0]}, {head!r} sorts, {order}", holds, values)
    sorted_columns = page.value(f"{element}.querySelectorAll('thead [aria-sort]:not([aria-sort=none])').length")
    failures.check("table: one heading says how it is sorted", sorted_columns == 1, sorted_columns)


def words(page: Page, failures: Failures) -> None:
    """Each column is explained in words that stand on the page, whole; the head and the two models too."""
    titles = page.value("[...document.querySelectorAll('table.sorted thead button')].map(b => b.title).filter(t => t)")
    said = page.value(
        "[...document.querySelectorAll('.change th small')].filter(e => e.offsetHeight &&"
        " e.scrollWidth <= e.clientWidth && e.getBoundingClientRect().right <= innerWidth).map(e => e.textContent)"
    )
    failures.check("words: every column's meaning is to be read", bool(titles) and set(titles) <= set(said), titles)
    for place in ("header .words", "#about"):
        lines = page.value(f"[...document.querySelectorAll('{place} dd')].map(e => e.offsetHeight && e.textContent)")
        failures.check(f"words: {place}", bool(lines) and all(lines), lines)


def slider(page: Page, failures: Failures, phone: bool) -> None:
    """The handle follows a drag and the keys; examples and models change the pictures."""
    clip = "getComputedStyle(document.querySelector('#wipe .upper')).clipPath"
    sources = "[...document.querySelectorAll('#wipe img')].map(image => image.src)"
    box = "document.getElementById('wipe')"
    begin, end = page.place(box), page.place(box, 0.8)
    before = page.value(clip)
    if phone:
        page.touch(begin, ((begin[0] + end[0]) / 2, begin[1]), end)
    else:
        page.mouse("mousePressed", begin)
        page.mouse("mouseMoved", end)
        page.mouse("mouseReleased", end)
    position = page.value("Number(document.getElementById('position').value)")
    failures.check("slider: a drag moves the clip", page.value(clip) != before and abs(position - 80) < 3, position)
    for key in ("ArrowLeft", "ArrowRight"):  # without a click on anything else
        before = page.value(clip)
        page.press(key)
        failures.check(f"slider: {key} moves the clip", page.value(clip) != before, before)
    before = page.value(sources)
    page.click("document.querySelectorAll('#examples button')[1]")
    after = page.value(sources)
    failures.check("slider: another example, other pictures", before[0] != after[0] and before[1] != after[1])
    right = "document.getElementById('right')"
    page.value(f"{right}.value = {right}.options.length - 1; {right}.dispatchEvent(new Event('change'))")
    name = page.value(
        f"{right}.selectedOptions[0].text === document.querySelector('#about div:last-child dt').textContent"
    )
    failures.check("slider: the words are those of the chosen model", name)
    columns = page.value("document.querySelectorAll('#pictures .head').length")
    same = page.value(
        f"[...document.querySelectorAll('#pictures .cell img')].at({1 - columns}).src"
        " === document.querySelector('#wipe img').src"
    )
    failures.check("slider: the photograph of the same example", same)
    scale = page.value("document.querySelector('#wipe img').width / document.querySelector('#wipe img').naturalWidth")
    failures.check("slider: a whole number of times, or less than one", scale < 1 or scale == round(scale), scale)


def enlarged(page: Page, failures: Failures, phone: bool) -> None:
    """A click enlarges, arrow keys go on, Esc closes and gives the focus back."""
    shown = "document.querySelector('dialog').open"
    caption = "document.querySelector('dialog p').textContent"
    cells = "document.querySelectorAll('#pictures .cell')"
    alt = cells + "[{}].firstElementChild.alt"
    if phone:
        page.touch(page.place(f"{cells}[0]"))
        time.sleep(0.5)
    else:
        page.click(f"{cells}[0]")
    failures.check(
        "picture: a click enlarges it", page.value(shown) and page.value(caption) == page.value(alt.format(0))
    )
    image = "document.querySelector('dialog img')"
    scale = page.value(f"{image}.width / {image}.naturalWidth")
    wider = page.value(f"{image}.width > {cells}[0].clientWidth")
    failures.check("picture: a whole number of times, or less than one", scale < 1 or scale == round(scale), scale)
    failures.check("picture: larger than in the grid", wider)
    fits = page.value("(r => r.left >= 0 && r.right <= innerWidth && r.top >= 0 && r.bottom <= innerHeight)"
                      "(document.querySelector('dialog').getBoundingClientRect())")  # fmt: skip
    failures.check("picture: fits the window", fits)
    page.press("ArrowRight")
    failures.check("picture: → is the next", page.value(caption) == page.value(alt.format(1)), page.value(caption))
    page.press("ArrowDown")
    columns = page.value("document.querySelectorAll('#pictures .head').length")
    failures.check("picture: ↓ is the next model", page.value(caption) == page.value(alt.format(1 + columns)))
    page.press("ArrowUp")
    page.press("ArrowLeft")
    page.press("ArrowLeft")
    failures.check("picture: ← stops at the first", page.value(caption) == page.value(alt.format(0)))
    page.press("Escape")
    failures.check("picture: Esc closes", not page.value(shown))
    failures.check("picture: the focus is back", page.value(f"document.activeElement === {cells}[0]"))


def main() -> None:
    failures = Failures()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder) / "report.html"
        if len(sys.argv) < 2:
            path.write_text(report.page(example()), encoding="utf-8")
        url = path.resolve().as_uri()
        with chromium() as page:
            for size, phone in ((DESKTOP, False), (PHONE, True)):
                print(f"{size[0]} × {size[1]}{', touch' if phone else ''}")
                page.open(url, size, phone)
                layout(page, failures, size[0])
                words(page, failures)
                table(page, failures)
                slider(page, failures, phone)
                enlarged(page, failures, phone)
                layout(page, failures, size[0])
                requests(page, failures, url)
    sys.exit(f"{failures.count} checks failed" if failures.count else 0)


if __name__ == "__main__":
    main()
