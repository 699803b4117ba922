"""Tries the page of a study in headless Chromium, on a desktop and on a phone: answers it, and reads what it saves.

    python -m tests.browser.study

Chromium comes from the system's packages, see chromium.py.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

from hgdpo_jax.browsing import study
from hgdpo_jax.config import ASSETS
from hgdpo_jax.pictures.read import read_image
from tests.browser.chromium import DESKTOP, PHONE, Failures, Page, chromium, layout, requests


def answer(page: Page, failures: Failures, folder: Path, size: tuple[int, int], phone: bool) -> None:
    """A person answers by what is seen: the answers are of the models, whichever side they were on."""
    portraits = sorted((ASSETS / "portraits" / "photographs").glob("*.jpg"))[:12]
    (folder / "evaluation").mkdir(exist_ok=True)
    for i, model in enumerate(("base", "hard")):
        pictures = np.stack([np.asarray(read_image(path)) for path in portraits[6 * i : 6 * i + 6]])
        captions = [f"caption {n}" for n in range(6)]
        np.savez(folder / "evaluation" / f"{model}.npz", pictures=pictures, captions=captions, mark=np.array("1"))
    url = study.write_study(folder, "base", "hard").as_uri()
    page.open(url, size, phone)
    said = page.value("document.querySelector('main').innerText")
    failures.check("study: says what to do and names nobody", "6 pairs" in said and "hard" not in said, said)
    page.click("byId('begin')")
    layout(page, failures, size[0])
    order, turned = page.value("asked.map(q => q.pair)"), page.value("asked.map(q => q.turned)")
    failures.check(
        "study: each pair twice, one after the other", order[::2] == order[1::2] and len({*order}) == 6, order
    )
    for i in range(12):
        caption = page.value("document.querySelector('dialog .text').textContent")
        right = caption == (f"caption {order[i]}" if i % 2 else "")
        if not right:
            failures.check("study: the text comes with its question", right, caption)
        second_is_left = page.value("document.querySelector('dialog img').src === data.pairs[asked[at].pair][2]")
        if i == 11:
            page.press("=")
        elif i % 2 == 0:  # the second model is always the more natural
            page.press("ArrowLeft" if second_is_left else "ArrowRight")
        else:
            page.press("ArrowRight" if second_is_left else "ArrowLeft")
    failures.check("study: both sides were used", len({*turned}) == 2, turned)
    failures.check("study: ends with the last answer", not page.value("document.querySelector('dialog').open"))
    page.wait("!byId('save').hidden")
    file = page.saved("byId('save')", folder)
    failures.check(
        "study: the file is named after the person", file.stem == f"answers-{page.value('state.person')}", file
    )
    rates = study.win_rates(study.read_answers(folder, [file]))
    found = [rate.value for rate in rates.values()]
    failures.check("study: the answers are of the models", np.allclose(found, [1, 0.5 / 6]), found)
    state = "JSON.stringify([asked, state])"
    before = page.value(state)
    page.open(url, size, phone)
    failures.check("study: the same order and answers when it is opened again", page.value(state) == before)
    page.value("localStorage.clear()")
    requests(page, failures, url)


def main() -> None:
    failures = Failures()
    with tempfile.TemporaryDirectory() as folder, chromium() as page:
        for size, phone in ((DESKTOP, False), (PHONE, True)):
            print(f"{size[0]} × {size[1]}{', touch' if phone else ''}")
            answer(page, failures, Path(folder), size, phone)
    sys.exit(f"{failures.count} checks failed" if failures.count else 0)


if __name__ == "__main__":
    main()
