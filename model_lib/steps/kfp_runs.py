"""A step's own run and other runs of the Kubeflow Pipelines server that started its pod."""

import json
import os
import urllib.error
import urllib.request

TIMEOUT = 5.0
"""Seconds to wait for an answer."""


def run_title(name: str) -> str:
    """Return a run's name for people; that of its workflow if it has none, as a scheduled run in
    Kubeflow Pipelines (2.17)."""
    return name or os.environ.get("KFP_WORKFLOW", "")


def run_state(run_id: str) -> str | None:
    """Return a run's state, such as SUCCEEDED or RUNNING; None if there is no server, or it has no
    such run: it may be another cluster's.

    The server is found by the variables that Kubernetes sets for a service in the pod's namespace.

    Raises:
        OSError: the server does not answer.
    """
    host, port = (os.environ.get(f"ML_PIPELINE_SERVICE_{name}") for name in ("HOST", "PORT"))
    if not host:
        return None
    url = f"http://{host}:{port}/apis/v2beta1/runs/{run_id}"
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            return str(json.load(response)["state"])
    except (urllib.error.HTTPError, ValueError, KeyError):
        return None
