"""Tries a report in headless Chromium: sorts, wipes, enlarges, on a desktop and on a phone, and listens for requests.

    python -m tests.browser.report [W/report.html]

Without a file the page of tests/results/test_report.py is tried. Chromium comes from the system's packages (apt install
chromium, or CHROMIUM=/path/to/chrome); it is spoken to over its DevTools pipe, which needs no Python package.
"""

import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hgdpo_jax.results import report
from tests.patience import patience
from tests.results.test_report import example

DESKTOP, PHONE = (1280, 800), (390, 844)
_PATIENCE = patience(15)
_KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Enter": 13, "Escape": 27}


class Page:
    """A page in Chromium: messages are JSON, each ended by a zero byte, to its descriptor 3 and from its 4."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read, self._received = write, read, b""
        self._numbers, self._session = itertools.count(1), {}
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._received:
            if not select.select([self._read], [], [], _PATIENCE)[0]:
                raise TimeoutError("Chromium does not answer")
            received = os.read(self._read, 1 << 20)
            if not received:
                raise ConnectionError("Chromium has ended")
            self._received += received
        message, self._received = self._received.split(b"\0", 1)
        return json.loads(message)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to a DevTools command; events that come before it are kept."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters} | self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._message()).get("id") != number:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def value(self, expression: str) -> Any:
        """What a JavaScript expression is."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def open(self, url: str, size: tuple[int, int], phone: bool) -> None:
        """Opens a file in a window of so many px, width and height."""
        self.events.clear()
        width, height = size
        scale = 2 if phone else 1
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone
        )
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        self.call("Page.navigate", url=url)
        deadline = time.monotonic() + _PATIENCE
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{url} does not load")
            self.events.append(self._message())

    def place(self, element: str, x: float = 0.5, y: float = 0.5) -> tuple[float, float]:
        """Where on the screen a point of an element is, in shares of its width and height."""
        left, top, width, height = self.value(
            f"(() => {{ const e = {element}; e.scrollIntoView({{block: 'center', inline: 'center'}});"
            "const r = e.getBoundingClientRect(); return [r.left, r.top, r.width, r.height]; })()"
        )
        return left + x * width, top + y * height

    def mouse(self, kind: str, at: tuple[float, float]) -> None:
        self.call("Input.dispatchMouseEvent", type=kind, x=at[0], y=at[1], button="left", buttons=1, clickCount=1)

    def click(self, element: str) -> None:
        at = self.place(element)
        self.mouse("mousePressed", at)
        self.mouse("mouseReleased", at)

    def touch(self, *points: tuple[float, float]) -> None:
        """A finger that goes down at the first point, over the others, and up."""
        for i, (x, y) in enumerate(points):
            kind = "touchMove" if i else "touchStart"
            self.call("Input.dispatchTouchEvent", type=kind, touchPoints=[{"x": x, "y": y}])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def press(self, key: str) -> None:
        event = {"key": key, "code": key, "windowsVirtualKeyCode": _KEYS[key]}
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **event, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)


@contextlib.contextmanager
def chromium() -> Iterator[Page]:
    """A page in a browser that ends with the block."""
    program = os.environ.get("CHROMIUM") or next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
    )
    if not program:
        sys.exit("Chromium is not installed: apt install chromium, or CHROMIUM=/path/to/chrome")
    theirs, write = os.pipe()
    read, back = os.pipe()
    with tempfile.TemporaryDirectory() as profile:
        options = [
            "--headless",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
            "--disable-gpu",
            "--no-first-run",
        ]
        if os.geteuid() == 0:  # its sandbox does not work for root
            options.append("--no-sandbox")
        command = ["bash", "-c", f'exec "$0" "$@" 3<&{theirs} 4>&{back}', program, *options]
        process = subprocess.Popen(command, pass_fds=(theirs, back), stderr=subprocess.DEVNULL)
        os.close(theirs)
        os.close(back)
        try:
            page = Page(write, read)
            yield page
            with contextlib.suppress(ConnectionError):
                page.call("Browser.close")
        finally:
            os.close(write)
            os.close(read)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class Failures:
    """Prints each check and counts those that fail."""

    def __init__(self) -> None:
        self.count = 0

    def check(self, what: str, holds: bool, found: Any = "") -> None:
        self.count += not holds
        print(f"{'ok  ' if holds else 'FAIL'} {what}{'' if holds else f': {found}'}")


def table(page: Page, failures: Failures) -> None:
    """Every column sorts both ways, by mouse and by key."""
    cells = "[...document.querySelector('table').tBodies[0].rows].map(r => r.cells[{}].dataset.value)"
    heads = page.value("[...document.querySelectorAll('thead th')].map(head => head.textContent)")
    for column, head in enumerate(heads):
        button = f"document.querySelectorAll('thead button')[{column}]"
        state = f"document.querySelectorAll('thead th')[{column}].ariaSort"
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
            failures.check(f"table: {head!r} sorts, {order}", holds, values)
    sorted_columns = page.value("document.querySelectorAll('thead [aria-sort]:not([aria-sort=none])').length")
    failures.check("table: one heading says how it is sorted", sorted_columns == 1, sorted_columns)


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
    before = page.value(clip)
    page.value("document.getElementById('position').focus()")
    page.press("ArrowLeft")
    failures.check("slider: a key moves the clip", page.value(clip) != before, before)
    before = page.value(sources)
    page.click("document.querySelectorAll('#examples button')[1]")
    after = page.value(sources)
    failures.check("slider: another example, other pictures", before[0] != after[0] and before[1] != after[1])
    right = "document.getElementById('right')"
    page.value(f"{right}.value = {right}.options.length - 1; {right}.dispatchEvent(new Event('change'))")
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


def layout(page: Page, failures: Failures, width: int) -> None:
    """Nothing is wider than the window."""
    found = page.value("document.documentElement.scrollWidth")
    failures.check("page: no wider than the window", found <= width, found)
    broken = page.value("[...document.images].filter(image => !image.naturalWidth).length")
    failures.check("page: every picture is one", broken == 0, broken)


def requests(page: Page, failures: Failures, url: str) -> None:
    """The browser read the file and nothing else, and had no complaint."""
    page.value("new Promise(done => setTimeout(done, 300))")
    sent = [e["params"]["request"]["url"] for e in page.events if e.get("method") == "Network.requestWillBeSent"]
    others = [address[:100] for address in sent if address != url and not address.startswith("data:")]
    failures.check("page: no request but for the file itself", url in sent and not others, others or sent[:3])
    complaints = [e["params"] for e in page.events if e.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded")]
    failures.check("page: no error", not complaints, complaints)


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
                table(page, failures)
                slider(page, failures, phone)
                enlarged(page, failures, phone)
                layout(page, failures, size[0])
                requests(page, failures, url)
    sys.exit(f"{failures.count} checks failed" if failures.count else 0)


if __name__ == "__main__":
    main()
