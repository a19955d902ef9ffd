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
from typing import Any

from model_lib.errors import first_line, printable
from model_lib.steps.kfp_runs import run_title
from model_lib.tracking.server import (
    NOTIFIED_TAG,
    MlflowTracking,
    require_mlflow,
    tracking_from_environment,
)

log = logging.getLogger(__name__)
ATTEMPTS = 3
SUCCEEDED, FAILED, UNKNOWN = "SUCCEEDED", "FAILED", "UNKNOWN"
COMPLETE = ("COMPLETE", "SUCCEEDED")
"""States of a run that succeeded, in Kubeflow Pipelines and in kfp.local."""


def finish_pipeline(run_name: str, last: bool = True) -> None:
    """End the pipeline run's MLflow run as succeeded and notify WEBHOOK_URL, if the calling step is
    the `last`.

    Called again, it notifies no second time.
    """
    if last:
        _end(run_name, SUCCEEDED, require_mlflow(tracking_from_environment()))


def close_pipeline(run_name: str, kfp_state: str) -> None:
    """End as failed the MLflow runs that a pipeline run left open, and notify WEBHOOK_URL unless
    that was done.

    Args:
        run_name: the pipeline run's name.
        kfp_state: as Kubeflow Pipelines (2.17) gives it to an exit handler: still RUNNING where the
            last steps were skipped or cached. It counts only where MLflow does not know.
    """
    try:
        tracking = require_mlflow(tracking_from_environment())
        run = tracking.pipeline_run()
        if run is not None:
            _end(run_name, SUCCEEDED if run.info.status == "FINISHED" else FAILED, tracking)
            return
        state = FAILED  # the first step creates the run, or fails
    except Exception as error:  # MLflow may be why the run failed
        log.warning("MLflow's runs were not ended: %s", printable(first_line(error)))
        state = FAILED if kfp_state == FAILED else UNKNOWN
    if kfp_state not in COMPLETE:  # else the last step has notified
        _notify(run_name, state, None)


def _end(run_name: str, state: str, tracking: MlflowTracking) -> None:
    run = tracking.close_pipeline(state == SUCCEEDED)
    if run is None:
        _notify(run_name, state, None)
        return
    run_id = run.info.run_id
    is_new = run.data.tags.get(NOTIFIED_TAG) != state
    if is_new and _notify(run_name, state, tracking.run_url(run_id)):
        try:
            tracking.client.set_tag(run_id, NOTIFIED_TAG, state)
        except Exception as error:  # at worst it is notified a second time
            log.warning("the notification is not in MLflow: %s", printable(first_line(error)))


def _notify(run_name: str, state: str, address: str | None) -> bool:
    """Post the outcome to WEBHOOK_URL, as `text` for chat rooms and its parts.

    Return whether the webhook accepted it.
    """
    webhook, name = os.environ.get("WEBHOOK_URL"), run_title(run_name)
    if not webhook:
        return False
    outcome = "ended, MLflow does not say how" if state == UNKNOWN else state.lower()
    text = f"captioner: {name} {outcome}" + (f" ({address})" if address else "")
    return _post(webhook, {"run": name, "state": state, "mlflow": address, "text": text})


def _post(webhook: str, document: dict[str, Any]) -> bool:
    """Post JSON; return whether it was accepted. The log does not show the address, a secret."""
    body, headers = json.dumps(document).encode(), {"Content-Type": "application/json"}
    for attempt in range(ATTEMPTS):
        try:
            request = urllib.request.Request(webhook, body, headers)
            with urllib.request.urlopen(request, timeout=10):
                return True
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = type(getattr(error, "reason", error)).__name__
            if isinstance(error, urllib.error.HTTPError):
                reason = f"status {error.code}"
            message = "the webhook did not accept the outcome (attempt %d): %s"
            log.warning(message, attempt + 1, reason)
            time.sleep(2**attempt)
    return False
