"""How long work shows itself: a bar on a terminal, a plain line every few seconds in a log."""

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
        name: what is being done.
        total: how many items there are.
        unit: what an item is.
        resumed: items that were done before.
        shown: whether to show anything: of several processes that work together, one does.
    """

    def __init__(
        self, name: str, total: int, unit: str, resumed: int = 0, shown: bool = True
    ) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done, self.resumed, self.started = resumed, resumed, time.monotonic()
        self.spoken, self.note, self.shown = self.started, "", shown
        terminal = shown and sys.stderr.isatty()
        self.bar = (
            tqdm(
                total=total,
                desc=name,
                unit=f" {unit}",
                leave=False,
                dynamic_ncols=True,
                initial=resumed,
            )
            if terminal
            else None
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.done and self.shown:
            self.say()

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count `count` more items; `note` says how it goes, a loss for example."""
        self.done += count
        self.note = note or self.note
        if self.bar is not None:
            self.bar.set_postfix_str(self.note, refresh=False)
            self.bar.update(count)
        elif self.shown and self.done < self.total and time.monotonic() - self.spoken > INTERVAL:
            self.say()  # of the end says the end

    def resume(self, count: int) -> None:
        """Count `count` items that were done before, which say nothing of the rate."""
        self.done += count
        self.resumed += count
        if self.bar is not None:
            self.bar.initial += count
            self.bar.update(count)

    def say(self) -> None:
        """Write one line: name, count, rate, time left, note."""
        self.spoken = time.monotonic()
        rate = (self.done - self.resumed) / max(self.spoken - self.started, 1e-9)
        seconds = int((self.total - self.done) / max(rate, 1e-9))
        left = f", {timedelta(seconds=seconds)} left" if 0 < seconds < 10**8 else ""
        note = f", {self.note}" if self.note else ""
        line = (
            f"{self.name}: {self.done:,}/{self.total:,} {self.unit}, {rate:,.1f} a "
            f"second{left}{note}"
        )
        print(line, file=sys.stderr, flush=True)
