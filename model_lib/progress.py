"""Progress of long work: a bar on a terminal, a plain line every few seconds in a log."""

import sys
import time
from datetime import timedelta
from typing import Self

from tqdm import tqdm

INTERVAL = 5.0
"""Seconds between two lines in a log."""


class Progress:
    """Counts items of work, on stderr.

    Args:
        name: of the work.
        total: number of items; 0: unknown, and only counts are shown.
        unit: plural of an item.
        resumed: items that were done before.
        shown: whether to show anything; of several processes that work together, one does.
    """

    def __init__(
        self, name: str, total: int, unit: str, resumed: int = 0, shown: bool = True
    ) -> None:
        self.name, self.total, self.unit, self.shown = name, total, unit, shown
        self.done = self.resumed = resumed
        self.started = self.logged = time.monotonic()
        self.note = ""
        self.bar = None
        if shown and sys.stderr.isatty():
            self.bar = tqdm(
                total=total or None,
                desc=name,
                unit=f" {unit}",
                leave=False,
                dynamic_ncols=True,
                initial=resumed,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.done and self.shown and (self.total or self.logged > self.started):
            self.log()

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count `count` more items; `note` is a figure to show, a loss for example."""
        self.done += count
        self.note = note or self.note
        if self.bar is not None:
            self.bar.set_postfix_str(self.note, refresh=False)
            self.bar.update(count)
        elif self.shown and self.done != self.total and time.monotonic() - self.logged > INTERVAL:
            self.log()  # the last line is for `__exit__`

    def resume(self, count: int) -> None:
        """Count `count` items that were done before, without effect on the rate."""
        self.done += count
        self.resumed += count
        if self.bar is not None:
            self.bar.initial += count
            self.bar.update(count)

    def log(self) -> None:
        """Write one line: name, count, rate, time left, note."""
        self.logged = time.monotonic()
        rate = (self.done - self.resumed) / max(self.logged - self.started, 1e-9)
        seconds = int((self.total - self.done) / max(rate, 1e-9))
        left = f", {timedelta(seconds=seconds)} left" if 0 < seconds < 10**8 else ""
        note = f", {self.note}" if self.note else ""
        total = f"/{self.total:,}" if self.total else ""
        count = f"{self.done:,}{total} {self.unit}, {rate:,.1f} a second"
        print(f"{self.name}: {count}{left}{note}", file=sys.stderr, flush=True)
