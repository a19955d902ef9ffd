"""Following a run on a Kubeflow Pipelines server to its end, and why it failed.

The server lists a run's steps, but not why one failed: `run.error` stays null. The reason is in the
manifest of its workflow, where Argo keeps the message that each pod left, or in the pod's log.
"""

import json
import re
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from model_lib.errors import printable
from pipelines.local import say

POLL = 2.0
"""Seconds between two looks at a run."""
RETRY_SECONDS = 600.0
"""Seconds for which a server that does not answer is asked again while its run goes on."""
LIST_PAUSE = 60.0
"""Seconds without news of a step after which it is asked whether the server still lists them."""
TIMEOUT = 60.0
"""Seconds for which a manifest or a log is waited for."""
ENDS = ("SUCCEEDED", "FAILED", "SKIPPED", "CANCELED")
DRIVER = "-driver"
"""Ending of a driver's name: it resolves a step's inputs before the step."""
LAUNCHERS = re.compile(r"[IWEF]\d{4} \d\d:\d\d:\d\d")
"""Beginning of the lines that Kubeflow Pipelines' own launcher adds to a step's log."""
OURS = re.compile(r"captioner: (?:error|failed): .*")
"""The line in which a step says why it ends."""


def follow(client: Any, run_id: str, names: Mapping[str, str]) -> tuple[str, str]:
    """Say what becomes of the run's steps until it ends; return its state, and why it failed.

    Args:
        client: kfp's.
        run_id: of the run.
        names: the steps' tasks, each with its display name. The server lists all nodes of the run's
            workflow.
    """
    import kfp_server_api
    import urllib3

    seen: dict[str, str] = {}
    answered = changed = time.monotonic()
    has_stopped = False
    while True:
        try:
            run = client.get_run(run_id)
            answered = time.monotonic()
        except (kfp_server_api.ApiException, urllib3.exceptions.HTTPError) as error:
            refused = isinstance(error, kfp_server_api.ApiException) and error.status in (
                401,
                403,
                404,
            )
            if refused or time.monotonic() - answered > RETRY_SECONDS:
                raise
            time.sleep(POLL)
            continue
        tasks = (run.run_details.task_details if run.run_details else None) or []
        steps = [
            (names[task.display_name], task)
            for task in tasks
            if task.display_name in names and task.state
        ]
        for name, task in steps:
            if seen.get(task.task_id) != task.state:
                seen[task.task_id], changed = task.state, answered
                say(f"  {name} {task.state.lower()}")
        if run.state in ENDS:
            return run.state, "" if run.state == "SUCCEEDED" else _reason(client, run, tasks, names)
        if not has_stopped and answered - changed > LIST_PAUSE:
            changed, has_stopped = (
                answered,
                "compressedNodes" in _workflow(client, run_id)["status"],
            )
            if has_stopped:
                say(
                    "  the run is too large for the server's list of steps, which has stopped; "
                    "waiting for its end"
                )
        time.sleep(POLL)


def _reason(client: Any, run: Any, tasks: list[Any], names: Mapping[str, str]) -> str:
    """Return why a run failed: of each step that did, or whose driver did, the line that says
    why."""
    workflow, failed = _workflow(client, run.run_id), []
    for task in tasks:
        is_driver = task.display_name.endswith(DRIVER)
        name = task.display_name.removesuffix(DRIVER)
        if task.state == "FAILED" and (is_driver or name in names):
            label = names.get(name, name) + ("'s driver" if is_driver else "")
            pod = _last_pod(workflow, [child.pod_name for child in task.child_tasks or []])
            line = "" if pod is None else _last_line(client, run.run_id, workflow, pod, is_driver)
            failed.append(f"{label}: {line}" if line else label)
    error = run.error.message if run.error and run.error.message else ""
    return error or (f"failed: {'; '.join(failed)}" if failed else "")


def _workflow(client: Any, run_id: str) -> dict[str, Any]:
    """Return the manifest of a run's workflow, with a status; one without nodes if the server has
    none to give.

    In a workflow of more than 1 MiB Argo compresses the nodes, and the server (2.17) lists none
    from there on.
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
    """Return the line that says why a pod failed: its message, else from its log."""
    message = pod.get("message") or ""
    if ours := OURS.findall(message):
        return printable(ours[-1])
    lines = [
        printable(line.strip())
        for line in _log(client, run_id, workflow, pod).splitlines()
        if line.strip()
    ]
    programs = [line for line in lines if is_driver or not LAUNCHERS.match(line)]
    return (
        [line for line in programs if OURS.match(line)] or programs or lines or [printable(message)]
    )[-1]


def _log(client: Any, run_id: str, workflow: dict[str, Any], pod: dict[str, Any]) -> str:
    """Return a pod's log: from the API server, or from the UI's server, which does not pass that
    request on."""
    log = _get(client, f"/apis/v1alpha1/runs/{run_id}/nodes/{pod['id']}/log")
    if log and not log.startswith(
        '{"error_message"'
    ):  # with status 200: the answer begins before the log is found
        return log
    number = pod["id"].rpartition("-")[2]
    query = {
        "podname": f"{workflow['metadata']['name']}-{pod.get('templateName')}-{number}",
        "runid": run_id,
    }
    return _get(client, f"/k8s/pod/logs?{urlencode(query)}")


def _get(client: Any, path: str) -> str:
    """Return what the server answers to a request that kfp's client does not know; nothing if it
    fails."""
    import kfp_server_api
    import urllib3

    options = {"auth_settings": ["Bearer"], "_preload_content": False, "_request_timeout": TIMEOUT}
    try:
        answer = client.runs.api_client.call_api(path, "GET", **options)
    except (kfp_server_api.ApiException, urllib3.exceptions.HTTPError):
        return ""
    return str(answer.data.decode(errors="replace"))
