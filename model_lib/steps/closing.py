"""The end of a pipeline run: its MLflow runs are ended and a webhook is told, by the last step or
by the exit handler.

The last step does it for a run that succeeded, the exit handler for the others: Kubeflow Pipelines
(2.17) runs that once, so not again after a *Retry* that succeeded, and not at all where Argo gives
a workflow up.
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
from model_lib.tracking.server import Tracking

log = logging.getLogger(__name__)
ATTEMPTS = 3
SUCCEEDED, FAILED, UNKNOWN = "SUCCEEDED", "FAILED", "UNKNOWN"
COMPLETE = ("COMPLETE", "SUCCEEDED")
"""What Kubeflow Pipelines calls a run that got to its end, and kfp.local."""


def finish_pipeline(run_name: str, tracking: Tracking, last: bool = True) -> None:
    """End the pipeline run's MLflow run as succeeded and notify WEBHOOK_URL, if there is one; at
    most once each.

    Args:
        run_name: the pipeline run's name.
        tracking: where its runs are.
        last: whether the step that calls it is the run's last; else nothing is done.
    """
    if last:
        _end(run_name, SUCCEEDED, tracking)


def close_pipeline(run_name: str, kfp_state: str, find_tracking: Callable[[], Tracking]) -> None:
    """End the MLflow runs that a pipeline run left open, as failed, and notify WEBHOOK_URL of what
    it does not know.

    Args:
        run_name: the pipeline run's name.
        kfp_state: as Kubeflow Pipelines (2.17) gives it to an exit handler: that of its
            bookkeeping, RUNNING still where the last steps were skipped or cached. It counts where
            MLflow does not know.
        find_tracking: returns the tracking; called here, as it may fail.
    """
    try:
        tracking = find_tracking()
        if tracking.parent() is not None:
            _end(run_name, SUCCEEDED if tracking.succeeded() else FAILED, tracking)
            return
        state = FAILED  # the first step makes the run, or ends the pipeline
    except Exception as error:  # MLflow may be why the run failed
        log.warning("MLflow's runs were not closed: %s", printable(first_line(error)))
        state = FAILED if kfp_state == FAILED else UNKNOWN
    if kfp_state not in COMPLETE:  # else the last step has said so
        _notify(run_name, state, None)


def _end(run_name: str, state: str, tracking: Tracking) -> None:
    address = tracking.close_pipeline(state == SUCCEEDED)
    if tracking.notified() != state and _notify(run_name, state, address):
        try:
            tracking.set_notified(state)
        except Exception as error:  # at worst it is told a second time
            log.warning(
                "MLflow does not know that the webhook was told: %s", printable(first_line(error))
            )


def _notify(run_name: str, state: str, address: str | None) -> bool:
    """Post the outcome to WEBHOOK_URL: `text` for chat rooms, and its parts; return whether it was
    taken."""
    webhook = os.environ.get("WEBHOOK_URL")
    if not webhook:
        return False
    text = f"captioner: {run_name} " + (
        "ended, MLflow does not say how" if state == UNKNOWN else state.lower()
    )
    document = {"run": run_name, "state": state, "mlflow": address}
    return _post(webhook, {**document, "text": text + (f" ({address})" if address else "")})


def _post(webhook: str, document: dict[str, Any]) -> bool:
    """Post JSON; return whether it was taken. The address is a secret, so it is not in the log."""
    for attempt in range(ATTEMPTS):
        try:
            request = urllib.request.Request(
                webhook, json.dumps(document).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=10):
                return True
        except (OSError, ValueError, http.client.HTTPException) as failure:
            if isinstance(failure, urllib.error.HTTPError):
                reason = f"status {failure.code}"
            else:
                reason = type(getattr(failure, "reason", failure)).__name__
            log.warning(
                "the webhook did not take the outcome (attempt %d): %s", attempt + 1, reason
            )
            time.sleep(2**attempt)
    return False
