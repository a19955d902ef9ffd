"""The end of a pipeline run: its MLflow runs are ended, and a webhook is notified.

The last step does it for a run that succeeded, the exit handler for the others. Kubeflow Pipelines
(2.17) runs the exit handler once: not again after a *Retry* that succeeded, and not at all where
Argo gives a workflow up.
"""

import http.client
import json
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from model_lib.errors import first_line, printable
from model_lib.tracking.runs import Tracking

log = logging.getLogger(__name__)
ATTEMPTS = 3
SUCCEEDED, FAILED, UNKNOWN = "SUCCEEDED", "FAILED", "UNKNOWN"
COMPLETE = ("COMPLETE", "SUCCEEDED")
"""States of a run that succeeded, in Kubeflow Pipelines and in kfp.local."""


def finish_pipeline(run_name: str, tracking: Tracking, last: bool = True) -> None:
    """End the pipeline run's MLflow run as succeeded and notify WEBHOOK_URL.

    Called again, it notifies no second time.

    Args:
        run_name: the pipeline run's name.
        tracking: of its runs.
        last: whether the calling step is the run's last; else nothing is done.
    """
    if last:
        _end(run_name, SUCCEEDED, tracking)


def close_pipeline(run_name: str, kfp_state: str, find_tracking: Callable[[], Tracking]) -> None:
    """End as failed the MLflow runs that a pipeline run left open, and notify WEBHOOK_URL unless
    that was done.

    Args:
        run_name: the pipeline run's name.
        kfp_state: as Kubeflow Pipelines (2.17) gives it to an exit handler: still RUNNING where the
            last steps were skipped or cached. It counts only where MLflow does not know.
        find_tracking: returns the tracking; called here, as it may fail.
    """
    try:
        tracking = find_tracking()
        if tracking.parent() is not None:
            _end(run_name, SUCCEEDED if tracking.succeeded() else FAILED, tracking)
            return
        state = FAILED  # the first step creates the run, or fails
    except Exception as error:  # MLflow may be why the run failed
        log.warning("MLflow's runs were not ended: %s", printable(first_line(error)))
        state = FAILED if kfp_state == FAILED else UNKNOWN
    if kfp_state not in COMPLETE:  # else the last step has notified
        _notify(run_name, state, None)


def _end(run_name: str, state: str, tracking: Tracking) -> None:
    address = tracking.close_pipeline(state == SUCCEEDED)
    if tracking.notified() != state and _notify(run_name, state, address):
        try:
            tracking.set_notified(state)
        except Exception as error:  # at worst it is notified a second time
            log.warning("the notification is not in MLflow: %s", printable(first_line(error)))


def _notify(run_name: str, state: str, address: str | None) -> bool:
    """Post the outcome to WEBHOOK_URL, as `text` for chat rooms and its parts.

    Return whether the webhook accepted it.
    """
    webhook = os.environ.get("WEBHOOK_URL")
    if not webhook:
        return False
    outcome = "ended, MLflow does not say how" if state == UNKNOWN else state.lower()
    text = f"captioner: {run_name} {outcome}" + (f" ({address})" if address else "")
    return _post(webhook, {"run": run_name, "state": state, "mlflow": address, "text": text})


def _post(webhook: str, document: dict[str, Any]) -> bool:
    """Post JSON; return whether it was accepted. The log does not show the address, a secret."""
    for attempt in range(ATTEMPTS):
        try:
            request = urllib.request.Request(
                webhook, json.dumps(document).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=10):
                return True
        except (OSError, ValueError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError):
                reason = f"status {error.code}"
            else:
                reason = type(getattr(error, "reason", error)).__name__
            message = "the webhook did not accept the outcome (attempt %d): %s"
            log.warning(message, attempt + 1, reason)
            time.sleep(2**attempt)
    return False
