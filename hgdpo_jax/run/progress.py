"""How far a work is: a bar in a terminal, and a plain line now and then where the output is kept."""

import sys
import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

# Seconds from one line to the next.
_SOONEST, _LATEST = 30.0, 300.0  # of a work's own lines
_TOLD = 10.0  # of lines that it is told: there may be several a second


class Progress(tqdm):
    """A bar of tqdm's, where stderr is a terminal.

    Elsewhere, as in a log file, it is lines: one for each tenth of the work, half a minute from each other at least
    and five minutes at most. So a work of less than half a minute says nothing, and none says that it is done.

    Args:
        iterable, desc, total, unit, initial, **bar: of tqdm.
        disable: neither bar nor lines, as in all processes but the first.
        told: lines are only what :meth:`tell` gets: where the work has pauses, its own pace says little.
    """

    def __init__(
        self,
        iterable: Any = None,
        desc: str = "",
        total: int | None = None,
        *,
        unit: str,
        initial: int = 0,
        disable: bool = False,
        told: bool = False,
        **bar: Any,
    ) -> None:
        from hgdpo_jax.run.processes import is_first  # which shows its own work with this

        silent = disable or not is_first()
        self._lines = not silent and not sys.stderr.isatty()
        super().__init__(iterable, desc, total, unit=unit, initial=initial, disable=silent or self._lines, **bar)
        self._what, self._unit, self._told = desc, unit, told
        self._said_at, self._begin, self._first, self._said = time.monotonic(), time.monotonic(), initial, initial

    def __iter__(self) -> Iterator[Any]:
        if not self._lines:
            yield from super().__iter__()
            return
        for each in self.iterable:
            yield each
            self.update()

    def update(self, n: float | None = 1) -> bool | None:
        """So much more is done."""
        if not self._lines:
            return super().update(n)
        self.n += n
        if self._told:
            return None
        now = time.monotonic()
        waited, tenth = now - self._said_at, self.total and self.n - self._said >= self.total / 10
        if self.n != self.total and (waited >= _LATEST or (waited >= _SOONEST and tenth)):
            pace = (now - self._begin) / (self.n - self._first)
            self._say("", (self.total - self.n) * pace / 3600 if self.total else None)
        return None

    def set_description(self, desc: str | None = None, refresh: bool | None = True) -> None:
        """What is being done now."""
        self._what = desc or ""
        super().set_description(desc, refresh)

    def tell(self, text: str, hours: float | None = None) -> None:
        """Shows figures of the work: behind the bar; or as a line, at most every ten seconds and at the end.

        Args:
            text: the figures.
            hours: to go, for the line. A bar reckons its own.
        """
        if not self._lines:
            self.set_postfix_str(text)
        elif self.n == self.total or time.monotonic() - self._said_at >= _TOLD:
            self._say(text, hours)

    def _say(self, text: str, hours: float | None) -> None:
        place = f"{self._unit} {self.n:,}" + (f" of {self.total:,}" if self.total else "")
        to_go = "" if hours is None or self.n == self.total else f"{self.format_interval(3600 * hours)} left"
        print(f"{self._what}: " + ", ".join(filter(None, (place, text, to_go))), file=sys.stderr, flush=True)
        self._said_at, self._said = time.monotonic(), self.n


def say(text: str) -> None:
    """Prints a line on stdout, above the bars that there are."""
    with tqdm.external_write_mode(file=sys.stdout):
        print(text, flush=True)
