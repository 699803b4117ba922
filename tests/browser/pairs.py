"""Tries the page of pairs in headless Chromium, on a desktop and on a phone: opens 10,000 of them, scrolls, searches,
sorts, rates by keys and fingers, and reads the file that the page saves.

    python -m tests.browser.pairs [W/browse/index.html]

With a file its first stage is tried instead. Chromium comes from the system's packages, see chromium.py.
"""

import hashlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from hgdpo_jax.browsing import page as pages
from hgdpo_jax.config import ASSETS
from hgdpo_jax.data.ratings import Ratings, read_exported
from tests.browser.chromium import DESKTOP, PHONE, Failures, Page, chromium, requests

MANY, STRENGTHS = 10_000, [4, 5, 6, 7]
CARDS = "document.querySelectorAll('.card')"
SHOWN = "document.querySelector('.count').textContent"


def write_example(folder: Path) -> Path:
    """A page of two stages: one of many pairs, and a small one that is not finished."""
    rng, pictures = np.random.default_rng(0), folder / "pictures"
    pictures.mkdir(parents=True)
    portraits = sorted((ASSETS / "portraits" / "photographs").glob("*.jpg"))
    for i in range(300):
        (pictures / f"{i:03d}.jpg").write_bytes(portraits[i % len(portraits)].read_bytes())
    stages = []
    for name, count in (("stage1", MANY), ("stage2", 30)):
        rows, sdrecon = [], name == "stage2"
        for i in range(count):
            winner, loser = sorted(rng.normal(0.2, 0.05, 2))[::-1]
            caption = f"a portrait photograph of person {i} in the {'park' if i % 50 else 'harbour <b>'}, soft light"
            sides = [f"{n % 300:03d}.jpg" for n in (3 * i, 3 * i + 1, 3 * i + 2)]
            split = "heldout_96x96" if i % 40 == 0 else "train_96x96"
            pair = hashlib.sha256(f"{name} {i}".encode()).hexdigest()[:16]
            scores = [float(f"{winner:.5g}"), float(f"{loser:.5g}")]
            drawn = [f"{(3 * i + k) % 300:03d}.jpg" for k in STRENGTHS] if sdrecon else []
            rows.append([f"photographs/{i:05d}.jpg", caption, split, *sides, *scores, i % 4 + 4, pair, "", drawn])
        stages.append({
            "name": name, "title": "normal" if sdrecon else "easy", "key": "0123", "finished": not sdrecon,
            "scored": True, "strengths": STRENGTHS if sdrecon else [],
            "winner": "sdrecon" if sdrecon else "pool", "loser": "stage1" if sdrecon else "pool",
            "pool": 20, "kept": 0.56 if sdrecon else None, "without": {"its file is missing": 3} if sdrecon else {},
            "rows": rows,
        })  # fmt: skip
    path = folder / "index.html"
    pages.write_page(path, pages.render("pairs.html", pages.PAIRS, {"run": "example", "stages": stages}))
    return path


def opening(page: Page, failures: Failures, seconds: float) -> None:
    """Many pairs are there soon, of which few have pictures yet."""
    cards = page.value(f"{CARDS}.length")
    metrics = {each["name"]: each["value"] for each in page.call("Performance.getMetrics")["metrics"]}
    busy = metrics["TaskDuration"]
    print(f"     {page.value(SHOWN)}: there after {seconds:.2f} s, in which the page itself computed {busy:.2f} s")
    failures.check("opening: under 3 s, but for what the machine does beside it", busy < 3, busy)
    failures.check("opening: some cards", 0 < cards <= 120, cards)
    pictures, there = page.value("(all => [all.length, all.filter(i => i.naturalWidth).length])([...document.images])")
    failures.check("opening: pictures come as one scrolls", there < pictures / 2 or cards < 20, [there, pictures])


def scrolling(page: Page, failures: Failures) -> None:
    before = page.value(f"{CARDS}.length")
    page.value("scrollTo(0, document.documentElement.scrollHeight)")
    page.wait(f"{CARDS}.length > {before}")
    after = page.value(f"{CARDS}.length")
    failures.check("list: more pairs as one scrolls", after > before, after)
    page.value("scrollTo(0, 0)")


def choosing(page: Page, failures: Failures) -> None:
    """Orders, splits and searches."""
    change = "(byId('{}').value = '{}', byId('{}').dispatchEvent(new Event('change')))"
    for order, key, down in (
        ("gap down", "gap(row)", True),
        ("gap up", "gap(row)", False),
        ("score down", "row[WINNER_SCORE]", True),
        ("score up", "row[WINNER_SCORE]", False),
    ):
        page.value(change.format("order", order, "order"))
        values = page.value(f"rows.map(row => {key})")
        failures.check(f"order: {order}", values == sorted(values, reverse=down), values[:5])
    page.value(change.format("order", "name up", "order"))
    names = page.value("rows.map(row => row[ID])")
    failures.check("order: by name", names == sorted(names), names[:5])
    page.value(change.format("order", "random", "order"))
    first = page.value("rows.map(row => row[ID])")
    page.click("byId('shuffle')")
    second = page.value("rows.map(row => row[ID])")
    failures.check("order: at random, another time otherwise", len({*first}) == len(first) and first != second != names)
    failures.check("order: nothing is lost", sorted(second) == names)
    page.value(change.format("split", "heldout", "split"))
    splits = page.value("[...new Set(rows.map(row => row[SPLIT].split('_')[0]))]")
    failures.check("split: held out", splits == ["heldout"], splits)
    page.value(change.format("split", "", "split"))
    page.press("/")
    failures.check("search: / goes there", page.value("document.activeElement === search"))
    for letter in "HARBOUR person 100":
        page.press(letter)
    found = page.value("rows.map(row => row[CAPTION])")
    texts = page.value("stage.rows.map(row => `${row[CAPTION]} ${row[ID]}`)")
    expected = sum(all(word in text for word in ("harbour", "person", "100")) for text in texts)
    failures.check("search: all words, whatever their case", len(found) == expected > 0, found[:3])
    shown = page.value(SHOWN)
    failures.check("search: says how many", shown.startswith(f"{expected} of "), shown)
    text = page.value(f"{CARDS}[0].querySelector('.caption').textContent")
    failures.check("card: a caption is text", text == found[0] and "<b>" in text, text)
    page.value("(search.value = '', search.dispatchEvent(new Event('input')))")
    page.value(change.format("order", "gap down", "order"))


def rating(page: Page, failures: Failures, phone: bool, folder: Path) -> dict[str, str]:
    """Keys, or fingers, rate one pair after the other; the page keeps it; the file is one that `pairs` reads."""
    shown, at = "document.querySelector('dialog').open", "at"
    if phone:
        page.touch(page.place(f"{CARDS}[0].querySelector('img')"))
        page.wait(shown)
    else:
        page.value(f"{CARDS}[0].focus()")
        page.press("ArrowRight")
        failures.check("list: → is the next card", page.value(f"document.activeElement === {CARDS}[1]"))
        page.press("ArrowLeft")
        page.press("Enter")
    failures.check("viewer: opens", page.value(shown) and page.value(at) == 0)
    hashes = page.value("rows.slice(0, 6).map(row => row[ID])")
    expected = dict(zip(hashes, ("winner", "loser", "equal", "neither"), strict=False))
    if phone:
        for label in ("A is better", "B is better", "Equal", "Drop"):
            press_label(page, label)
    else:
        for key in ("ArrowLeft", "ArrowRight", "=", "x"):
            page.press(key)
    failures.check("viewer: goes on after each", page.value(at) == 4, page.value(at))
    sides(page, failures)
    page.value("document.querySelectorAll('dialog img').length && (hidden || viewer.keys.h())")
    titles = page.value("[...document.querySelectorAll('dialog figcaption')].map(e => e.textContent)")
    failures.check("viewer: it can be hidden which won", titles[:2] == ["A", "B"], titles)
    for _ in range(2):  # by what one sees, not by the order
        left = page.value("document.querySelector('dialog img').src.endsWith('/' + rows[at][WINNER])")
        name = page.value("rows[at][ID]")
        press_label(page, "A is better") if phone else page.press("ArrowLeft")
        expected[name] = "winner" if left else "loser"
    page.press("h")
    failures.check("viewer: previous and next", step(page) == [5, 6], step(page))
    page.press("Escape")
    page.wait("document.activeElement === cards[at]")
    failures.check("viewer: Esc closes, and the focus is at its card",
                   not page.value(shown) and page.value("document.activeElement === cards[at]"))  # fmt: skip
    marks = page.value("cards.slice(0, 4).map(card => card.querySelector('.rated').textContent)")
    failures.check("card: says how it is rated", marks == [
        "winner is better", "swapped", "equal, left out", "dropped"], marks)  # fmt: skip
    (folder / "ratings.json").unlink(missing_ok=True)
    file = page.saved("byId('save')", folder)
    failures.check("file: its name", file.name == "ratings.json", file)
    name = page.value("stage.name")
    exported = read_exported(file, name) or {}
    found = {key: entry["better"] for key, entry in exported.items()}
    failures.check("file: what was rated", found == expected, found)
    same = page.value(f"{json.dumps(list(exported))}.every((id, i) => stage.rows.find(row => row[ID] === id)[HASH] === "
                      f"{json.dumps([entry['pair'] for entry in exported.values()])}[i])")  # fmt: skip
    failures.check("file: which pairs", same)
    print(f"     the file: {Ratings(found)}")
    return expected


def press_label(page: Page, label: str) -> None:
    """A finger on a button."""
    key = f"[...document.querySelectorAll('dialog .key')].find(e => e.textContent.includes({json.dumps(label)}))"
    page.touch(page.place(key))
    page.value("new Promise(done => setTimeout(done, 400))")


def step(page: Page) -> list[int]:
    page.press("ArrowUp")
    before = page.value("at")
    page.press("ArrowDown")
    return [before, page.value("at")]


def sides(page: Page, failures: Failures) -> None:
    """All pictures fit, are large and undistorted, and each pixel of a small one is a whole number of the screen's."""
    page.wait("[...document.querySelectorAll('dialog img')].every(image => image.complete)")
    box = "const r = image.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom"
    each = f"image => {{ {box}, image.naturalWidth, image.naturalHeight]; }}"
    boxes = page.value(f"[...document.querySelectorAll('dialog img')].map({each})")
    width, height = page.value("[innerWidth, innerHeight]")
    inside = all(l >= 0 and t >= 0 and r <= width and b <= height for l, t, r, b, _, _ in boxes)  # noqa: E741
    failures.check("viewer: pictures are inside the window", inside and len(boxes) == 3, boxes)
    scales = [(r - l) / w for l, t, r, b, w, h in boxes] + [(b - t) / h for l, t, r, b, w, h in boxes]  # noqa: E741
    pixels = scales[0] * page.value("devicePixelRatio")
    even = max(scales) - min(scales) < 0.02 and (scales[0] < 2 or abs(pixels - round(pixels)) < 1e-3)
    failures.check("viewer: all of one size, a whole number of times", even, scales)
    share = sum((r - l) * (b - t) for l, t, r, b, _, _ in boxes) / (width * height)  # noqa: E741
    failures.check("viewer: pictures take a good part of the window", share > 0.2, share)


def again(
    page: Page, failures: Failures, url: str, size: tuple[int, int], phone: bool, expected: dict[str, str]
) -> None:
    """The browser keeps ratings; a rating that is given again is taken back."""
    page.open(url, size, phone)
    found = page.value(
        "Object.fromEntries(stage.rows.filter(r => ratings.get(stage, r)).map(r => [r[ID], ratings.get(stage, r)]))"
    )
    failures.check("kept: ratings are there when it is opened again", found == expected, found)
    text, taken = "byId('about').textContent", "stage.rows.forEach(row => { row[RATED] = ratings.get(stage, row); })"
    failures.check("kept: pairs is to get them", page.value(f"{text}.includes('give the file to pairs')"))
    page.value(f"({taken}, about())")  # as if it had them
    failures.check("kept: until it has them", page.value(f"{text}.includes('The run uses them')"))
    page.value("(stage.rows.forEach(row => { row[RATED] = ''; }), about())")
    page.value("(byId('rated').value = 'yes', select())")
    failures.check("kept: what is rated can be listed", page.value("rows.length") == len(expected))
    page.value("open(0)")
    page.value("rate(ratings.get(stage, rows[0]))")
    failures.check("viewer: a rating is taken back", page.value("ratings.get(stage, rows[0])") == "")
    page.press("Escape")
    page.wait(f"rows.length === {len(expected) - 1}")
    failures.check("kept: and its pair leaves the list", page.value("rows.length") == len(expected) - 1)
    page.value("(localStorage.clear(), byId('rated').value = '')")


def stages(page: Page, failures: Failures) -> None:
    if page.value("data.stages.length") < 2:
        return
    page.click("document.querySelectorAll('nav a')[1]")
    page.wait("stage === data.stages[1]")
    text = page.value("byId('about').textContent")
    failures.check("stage: another one", page.value(SHOWN) == f"{page.value('data.stages[1].rows.length')} pairs")
    if page.value("stage.kept !== null"):
        failures.check("stage: what the filter keeps", f"{round(100 * page.value('stage.kept'))}\u00a0%" in text, text)
    charts = page.value("document.querySelectorAll('.histogram').length")
    failures.check("stage: histograms", charts == 2 or not page.value("stage.scored"), charts)
    pairs = page.value(
        "[...document.querySelectorAll('.histogram')].every(chart => chart.querySelectorAll('rect').length > 3)"
    )
    failures.check("stage: with bars", pairs)


def reconstructed(page: Page, failures: Failures) -> None:
    """The photograph beside its reconstructions, of which one won."""
    page.value("open(0)")
    number = page.value("rows[0][NUMBER]")
    page.press("t")
    titles = page.value("[...document.querySelectorAll('dialog figcaption')].map(e => e.textContent)")
    names = ["photograph", *(f"t{strength}" for strength in STRENGTHS)]
    failures.check("viewer: reconstructions", [title.split(" ")[0] for title in titles] == names, titles)
    winners = [title for title in titles if "winner" in title]
    failures.check("viewer: which of them won", [title[:2] for title in winners] == [f"t{number}"], winners)
    page.press("ArrowLeft")
    failures.check("viewer: nothing is rated there", page.value("[at, ratings.get(stage, rows[0])]") == [0, ""])
    page.press("t")
    page.press("Escape")


def loaded(page: Page, failures: Failures) -> None:
    """Every picture that is on the screen is one."""
    box = "const r = image.getBoundingClientRect(); return r.bottom > 0 && r.top < innerHeight;"
    visible = f"[...document.images].filter(image => {{ {box} }})"
    page.wait(f"{visible}.every(image => image.complete)")
    broken = page.value(f"{visible}.filter(image => !image.naturalWidth).map(image => image.src)")
    failures.check("page: every picture is one", not broken, broken)


def main() -> None:
    failures = Failures()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        path = Path(sys.argv[1]) if len(sys.argv) > 1 else write_example(folder / "browse")
        url = path.resolve().as_uri()
        for size, phone in ((DESKTOP, False), (PHONE, True)):
            with chromium() as page:  # in whose cache there is nothing
                print(f"{size[0]} × {size[1]}{', touch' if phone else ''}")
                page.call("Performance.enable", timeDomain="threadTicks")  # of the page's own time
                begun = time.monotonic()
                page.open(url, size, phone)
                opening(page, failures, time.monotonic() - begun)
                loaded(page, failures)
                scrolling(page, failures)
                if len(sys.argv) < 2:
                    choosing(page, failures)
                    again(page, failures, url, size, phone, rating(page, failures, phone, folder))
                stages(page, failures)
                if len(sys.argv) < 2:
                    reconstructed(page, failures)
                loaded(page, failures)
                wide: Any = page.value("document.documentElement.scrollWidth")
                failures.check("page: no wider than the window", wide <= size[0], wide)
                requests(page, failures, url, url.removesuffix("index.html") + "pictures/")
    sys.exit(f"{failures.count} checks failed" if failures.count else 0)


if __name__ == "__main__":
    main()
