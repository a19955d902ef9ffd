"""What a step knows of its run, and of other runs, of the Kubeflow Pipelines server that started
its pod."""

import http.client
import json
import os
import urllib.request

TIMEOUT = 5.0
"""Seconds for which an answer is waited for."""


def run_title(name: str) -> str:
    """Return a run's name for people: its workflow's if it has none, as scheduled runs in Kubeflow
    Pipelines (2.17)."""
    return name or os.environ.get("KFP_WORKFLOW", "")


def run_state(run_id: str) -> str | None:
    """Return a run's state, "SUCCEEDED" or "RUNNING" …; None where no server knows it: it may be
    another cluster's.

    The server is found as Kubernetes tells a pod of a service in its namespace.
    """
    host, port = (
        os.environ.get("ML_PIPELINE_SERVICE_HOST"),
        os.environ.get("ML_PIPELINE_SERVICE_PORT"),
    )
    if not host or not port:
        return None
    try:
        with urllib.request.urlopen(
            f"http://{host}:{port}/apis/v2beta1/runs/{run_id}", timeout=TIMEOUT
        ) as answer:
            return str(json.load(answer)["state"])
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException):
        return None
