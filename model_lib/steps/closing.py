"""The end of a pipeline run: its MLflow runs are ended, and a webhook hears of it."""

import http.client
import json
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

from model_lib.errors import first_line, printable
from model_lib.tracking.server import Tracking

log = logging.getLogger(__name__)
ATTEMPTS = 3


def close_pipeline(run_name: str, last: Sequence[str], find_tracking: Callable[[], Tracking]) -> dict[str, Any]:
    """End the run's open MLflow runs and post the outcome to WEBHOOK_URL, if there is one.

    Whether the run succeeded is read from the marks that its last steps left in MLflow. The state which Kubeflow
    Pipelines (2.17) tells an exit handler is that of its bookkeeping: COMPLETE or FAILED, but RUNNING still where the
    last steps were skipped or cached. Neither MLflow nor the webhook being away is a reason for a good run to fail.

    Args:
        run_name: the pipeline run's name.
        last: the steps that end a run which succeeded.
        find_tracking: returns the tracking; called here, as it may fail.

    Returns:
        What was posted: `text` for chat rooms, and its parts; `state` is SUCCEEDED, FAILED or UNKNOWN.
    """
    state, address = "UNKNOWN", None
    try:
        tracking = find_tracking()
        if tracking.parent() is not None:
            succeeded = set(last) <= tracking.marks()
            state = "SUCCEEDED" if succeeded else "FAILED"
            address = tracking.close_pipeline(succeeded)
        else:
            state = "FAILED"  # the first step makes the run, or ends the pipeline
    except Exception as failure:  # MLflow may be why the run failed
        log.warning("MLflow's runs were not closed: %s", printable(first_line(failure)))
    told = {"run": run_name, "state": state, "mlflow": address}
    text = f"captioner: {run_name} " + ("ended, MLflow does not say how" if state == "UNKNOWN" else state.lower())
    told["text"] = text + (f" ({address})" if address else "")
    webhook = os.environ.get("WEBHOOK_URL")
    if webhook:
        _post(webhook, told)
    return told


def last_steps(registers: bool, images: str) -> list[str]:
    """Return the steps that end a run: one that trains registers, and one with pictures to caption merges."""
    return [*(["register"] if registers else []), *(["merge"] if images else [])]


def _post(webhook: str, document: dict[str, Any]) -> None:
    """Post JSON; the address is a secret, so it is not in the log."""
    for attempt in range(ATTEMPTS):
        try:
            request = urllib.request.Request(
                webhook, json.dumps(document).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=10):
                return
        except (OSError, ValueError, http.client.HTTPException) as failure:
            if isinstance(failure, urllib.error.HTTPError):
                reason = f"status {failure.code}"
            else:
                reason = type(getattr(failure, "reason", failure)).__name__
            log.warning("the webhook did not take the outcome (attempt %d): %s", attempt + 1, reason)
            time.sleep(2**attempt)
