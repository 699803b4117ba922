"""Chromium, headless, from the system's packages (apt install chromium, or CHROMIUM=/path/to/chrome), and what every
page is asked. It is spoken to over its DevTools pipe, which needs no Python package.
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

from tests.patience import patience

DESKTOP, PHONE = (1280, 800), (390, 844)
_PATIENCE = patience(15)
_KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Enter": 13, "Escape": 27, "Tab": 9}


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

    def wait(self, condition: str) -> None:
        """Until a JavaScript expression holds, for a while."""
        self.value(f"new Promise(done => {{ const begun = Date.now(), look = () => ({condition}) || "
                   f"Date.now() - begun > {1000 * _PATIENCE} ? done() : setTimeout(look, 50); look(); }})")  # fmt: skip

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

    def saved(self, element: str, folder: Path) -> Path:
        """The file that a page saves when one clicks on an element."""
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder.resolve()))
        before = {*folder.iterdir()}
        self.click(element)
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            found = [path for path in folder.iterdir() if path not in before and path.suffix == ".json"]
            if found:
                return found[0]
            time.sleep(0.05)
        raise TimeoutError("the page saves nothing")

    def press(self, key: str) -> None:
        event = {"key": key, "code": key, "windowsVirtualKeyCode": _KEYS.get(key, 0)}
        text = {"text": "\r"} if key == "Enter" else {"text": key} if len(key) == 1 else {}
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


def layout(page: Page, failures: Failures, width: int) -> None:
    """Nothing is wider than the window."""
    found = page.value("document.documentElement.scrollWidth")
    failures.check("page: no wider than the window", found <= width, found)
    broken = page.value("[...document.images].filter(image => !image.naturalWidth).length")
    failures.check("page: every picture is one", broken == 0, broken)


def requests(page: Page, failures: Failures, url: str, beside: str = "data:") -> None:
    """The browser read the file and nothing else, but for what begins with `beside`, and had no complaint."""
    page.value("new Promise(done => setTimeout(done, 300))")
    sent = [e["params"]["request"]["url"] for e in page.events if e.get("method") == "Network.requestWillBeSent"]
    others = [address[:100] for address in sent if address != url and not address.startswith(("data:", beside))]
    failures.check("page: no request but for the file itself", url in sent and not others, others or sent[:3])
    complaints = [e["params"] for e in page.events if e.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded")]
    failures.check("page: no error", not complaints, complaints)
