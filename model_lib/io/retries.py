"""Retries of what fails on the network and may pass."""

import logging
import os
from collections.abc import Callable
from typing import Any, TypeVar

import tenacity

from model_lib.errors import UserError, first_line, printable
from model_lib.io.errors import is_transient

log = logging.getLogger(__name__)
RETRY_SECONDS = 600.0
"""Time for which a transient error is retried, unless CAPTIONER_RETRY_SECONDS names another."""
LONGEST_PAUSE = 60.0
T = TypeVar("T")


def retry(what: str, action: Callable[[], T], seconds: float | None = None) -> T:
    """Return what `action` returns, retried with growing pauses while its error is transient.

    Drivers retry for some seconds by themselves; this outlasts a server that answers 429 or 503 for
    minutes. Other errors, and the last one, are raised as they are.

    Args:
        what: name for the log.
        action: the call.
        seconds: time for which it is retried; None: as the environment says.
    """

    def log_retry(state: Any) -> None:
        error, pause = state.outcome.exception(), state.next_action.sleep
        reason = f"{type(error).__name__}: {printable(first_line(error))}"
        level = logging.INFO if state.attempt_number == 1 else logging.WARNING
        log.log(level, "%s: fails (%s); next attempt in %.0f s", what, reason, pause)

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(is_transient),
        wait=tenacity.wait_random_exponential(max=LONGEST_PAUSE),
        stop=tenacity.stop_before_delay(_retry_seconds() if seconds is None else seconds),
        before_sleep=log_retry,
        reraise=True,
    )
    return retrying(action)


def _retry_seconds() -> float:
    value = os.environ.get("CAPTIONER_RETRY_SECONDS", RETRY_SECONDS)
    try:
        return float(value)
    except ValueError:
        raise UserError(f"CAPTIONER_RETRY_SECONDS={value}: is not a number of seconds") from None
