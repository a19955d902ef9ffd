"""Following a run on a Kubeflow Pipelines server to its end, and why it failed.

The server (2.17) lists a run's steps, but not why one failed: `run.error` stays null. The reason is
in the manifest of the run's Argo workflow, as a pod's message, or in the pod's log.
"""

import json
import re
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from model_lib.errors import printable
from model_lib.io.retries import retry
from pipelines.local import say

POLL = 2.0
"""Seconds between two looks at a run."""
LIST_PAUSE = 60.0
"""Seconds without news after which it is checked whether the server still lists the steps."""
TIMEOUT = 60.0
"""Seconds that a request for a manifest or a log may take."""
ENDS = ("SUCCEEDED", "FAILED", "SKIPPED", "CANCELED")
DRIVER = "-driver"
"""End of a driver's name, which resolves a step's inputs before the step."""
LAUNCHER = re.compile(r"[IWEF]\d{4} \d\d:\d\d:\d\d")
"""Beginning of the lines that Kubeflow Pipelines' own launcher adds to a step's log."""
REASON = re.compile(r"captioner: (?:error|failed): .*")
"""The line in which a step says why it ends."""


def follow(client: Any, run_id: str, names: Mapping[str, str]) -> tuple[str, str]:
    """Print the states of a run's steps until it ends; return its state, and why it failed.

    Args:
        client: kfp's.
        run_id: of the run.
        names: display name of each task that is a step; the server lists all nodes.
    """
    states: dict[str, str] = {}
    changed, is_listed = time.monotonic(), True
    while True:
        run = retry("Kubeflow Pipelines", lambda: client.get_run(run_id))
        tasks = (run.run_details.task_details if run.run_details else None) or []
        for task in tasks:
            is_step = task.display_name in names and task.state
            if is_step and states.get(task.task_id) != task.state:
                states[task.task_id], changed = task.state, time.monotonic()
                say(f"  {names[task.display_name]} {task.state.lower()}")
        if run.state in ENDS:
            return run.state, "" if run.state == "SUCCEEDED" else _reason(client, run, tasks, names)
        if is_listed and time.monotonic() - changed > LIST_PAUSE:
            changed = time.monotonic()
            if "compressedNodes" in _workflow(client, run_id)["status"]:
                is_listed = False
                say("  the run is too large for the server's list of steps; waiting for its end")
        time.sleep(POLL)


def _reason(client: Any, run: Any, tasks: list[Any], names: Mapping[str, str]) -> str:
    """Return the last line of each failed step or driver."""
    workflow, reasons = _workflow(client, run.run_id), []
    for task in tasks:
        name = task.display_name.removesuffix(DRIVER)
        if task.state != "FAILED" or (name == task.display_name and name not in names):
            continue
        is_driver = name != task.display_name
        label = names.get(name, name) + ("'s driver" if is_driver else "")
        children = [child.pod_name for child in task.child_tasks or []]
        pod = _last_pod(workflow, children) or ({"id": children[0]} if children else None)
        line = "" if pod is None else _last_line(client, run.run_id, workflow, pod, is_driver)
        reasons.append(f"{label}: {line}" if line else label)
    if reasons:
        return f"failed: {'; '.join(reasons)}"
    if run.error and run.error.message:
        return str(run.error.message)
    return "failed, and the server lists no step that did; the pods' logs have the reason"


def _workflow(client: Any, run_id: str) -> dict[str, Any]:
    """Return the manifest of a run's workflow, with a status, if only an empty one.

    In a workflow of more than 1 MiB Argo compresses the nodes, and the server (2.17) lists no more.
    """
    try:
        detail = json.loads(_get(client, f"/apis/v1beta1/runs/{run_id}"))
        return {"status": {}, **json.loads(detail["pipeline_runtime"]["workflow_manifest"])}
    except (KeyError, TypeError, ValueError):
        return {"status": {}}


def _last_pod(workflow: dict[str, Any], ids: list[str]) -> dict[str, Any] | None:
    """Return the newest failed pod among some nodes and those below: the last attempt."""
    nodes, ids, pods = workflow["status"].get("nodes") or {}, list(ids), []
    while ids:
        node = nodes.get(ids.pop(), {})
        if node.get("type") != "Pod":
            ids += node.get("children") or []
        elif node.get("phase") in ("Failed", "Error"):
            pods.append(node)
    return max(pods, key=lambda node: str(node.get("startedAt")), default=None)


def _last_line(
    client: Any, run_id: str, workflow: dict[str, Any], pod: dict[str, Any], is_driver: bool
) -> str:
    """Return the line that says why a pod failed: from its message, else from its log."""
    message = pod.get("message") or ""
    if reasons := REASON.findall(message):
        return printable(reasons[-1])
    log = [line.strip() for line in _log(client, run_id, workflow, pod).splitlines()]
    lines = [line for line in log if line]
    own = [line for line in lines if is_driver or not LAUNCHER.match(line)]
    reasons = [line for line in own if REASON.match(line)]
    return printable((reasons or own or lines or [message])[-1])


def _log(client: Any, run_id: str, workflow: dict[str, Any], pod: dict[str, Any]) -> str:
    """Return a pod's log, from the API server or, where only the UI's server is reached, from
    that."""
    log = _get(client, f"/apis/v1alpha1/runs/{run_id}/nodes/{pod['id']}/log")
    if log and not log.startswith('{"error_message"'):  # that has status 200, too
        return log
    if "metadata" not in workflow:
        return ""
    number = pod["id"].rpartition("-")[2]
    name = f"{workflow['metadata']['name']}-{pod.get('templateName')}-{number}"
    return _get(client, f"/k8s/pod/logs?{urlencode({'podname': name, 'runid': run_id})}")


def _get(client: Any, path: str) -> str:
    """Return the answer to a request that kfp's client has no function for; "" if it fails."""
    import kfp_server_api
    import urllib3

    options = {"auth_settings": ["Bearer"], "_preload_content": False, "_request_timeout": TIMEOUT}
    try:
        response = client.runs.api_client.call_api(path, "GET", **options)
    except (kfp_server_api.ApiException, urllib3.exceptions.HTTPError):
        return ""
    return str(response.data.decode(errors="replace"))
