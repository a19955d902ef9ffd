"""Asking again, when a server on the network fails in a way that may pass."""

import itertools
import logging
import os
import random
import time
from collections.abc import Callable
from typing import TypeVar

from model_lib.errors import UserError, first_line, printable

log = logging.getLogger(__name__)
RETRY_SECONDS = 600.0
"""Seconds for which what fails is asked again, unless CAPTIONER_RETRY_SECONDS says otherwise."""
LONGEST_PAUSE = 60.0
_ANSWER = TypeVar("_ANSWER")


def retry(
    what: str,
    action: Callable[[], _ANSWER],
    passing: Callable[[Exception], bool],
    seconds: float | None = None,
) -> _ANSWER:
    """Return what `action` returns, tried again after growing pauses while it fails in a way that
    may pass.

    Drivers try again for some seconds by themselves; this outlasts a server that answers 429 or 503
    for minutes. What fails otherwise is raised at once, and so is what still fails after
    `RETRY_SECONDS`.

    Args:
        what: name of what is asked, for the log.
        action: the call.
        passing: whether a failure is worth another try.
        seconds: for which it is tried, instead of `RETRY_SECONDS`.
    """
    if seconds is None:
        given = os.environ.get("CAPTIONER_RETRY_SECONDS", RETRY_SECONDS)
        try:
            seconds = float(given)
        except ValueError:
            raise UserError(
                f"CAPTIONER_RETRY_SECONDS={given}: is not a number of seconds"
            ) from None
    started = time.monotonic()
    for attempt in itertools.count():
        try:
            return action()
        except Exception as error:
            pause = min(LONGEST_PAUSE, 2.0**attempt) * random.uniform(
                0.5, 1
            )  # apart from others that failed with us
            if not passing(error) or time.monotonic() - started + pause > seconds:
                raise
            reason = f"{type(error).__name__}: {printable(first_line(error))}"
            level = logging.WARNING if attempt else logging.INFO  # what passes at once is no news
            log.log(level, "%s: fails (%s); asking again in %.0f s", what, reason, pause)
            time.sleep(pause)
    raise AssertionError("unreachable")


def is_transient_status(status: int) -> bool:
    """Return whether an HTTP status is worth another try: a timeout, too many requests, a fault of
    the server's."""
    return status in (408, 429) or status >= 500
