"""The end of a pipeline run: its MLflow runs are ended, and a webhook hears of it."""

import json
import logging
import os
import time
import urllib.request
from typing import Any

from model_lib.errors import first_line
from model_lib.tracking import Tracking

log = logging.getLogger(__name__)
ATTEMPTS = 3


def close_pipeline(run_name: str, state: str, error: str, tracking: Tracking) -> dict[str, Any]:
    """End the run's open MLflow runs and post the outcome to WEBHOOK_URL, if there is one.

    Neither failing is a reason for a good run to count as failed: it is logged.

    Args:
        run_name: the pipeline run's name.
        state: SUCCEEDED, FAILED or CANCELLED.
        error: why it failed, or empty.

    Returns:
        What was posted: `text` for chat rooms, and its parts.
    """
    succeeded = state == "SUCCEEDED"
    address = None
    try:
        address = tracking.close_pipeline(succeeded)
    except Exception as failure:  # MLflow may be why the run failed
        log.warning("MLflow's runs were not closed: %s", first_line(failure))
    told = {"run": run_name, "state": state, "error": error, "mlflow": address}
    text = f"captioner: {run_name} {state.lower()}"
    told["text"] = ": ".join(part for part in (text, error) if part) + (f" ({address})" if address else "")
    webhook = os.environ.get("WEBHOOK_URL")
    if webhook:
        _post(webhook, told)
    return told


def _post(webhook: str, document: dict[str, Any]) -> None:
    """Post JSON; the address is a secret, so it is not in the log."""
    for attempt in range(ATTEMPTS):
        try:
            request = urllib.request.Request(
                webhook, json.dumps(document).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=10):
                return
        except (OSError, ValueError) as failure:
            reason = type(failure).__name__ if isinstance(failure, ValueError) else first_line(failure)
            log.warning("the webhook did not take the outcome (attempt %d): %s", attempt + 1, reason)
            time.sleep(2**attempt)
