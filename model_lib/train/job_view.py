"""A TrainJob's progress as its step shows it: the first machine's log, the reasons for which
machines wait, and those for which they ended."""

import logging
import re
import sys
import time
from typing import Any

from model_lib.errors import UserError, WorkError
from model_lib.exits import MISTAKE
from model_lib.train.kubernetes import NODE, Cluster

log = logging.getLogger(__name__)
POLL = 5.0
"""Seconds between two looks at a job."""
INDEX = "batch.kubernetes.io/job-completion-index"
START_ERRORS = {
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "CreateContainerConfigError",
}
"""Reasons for which a container waits, and which rarely go away."""
START_SECONDS = 600.0
"""Time after which a machine that waits for one of them fails the job."""
NO_PODS_SECONDS = 60.0
"""Time without any pod after which warnings about the job are shown."""
LAST_LINES = 60
"""Lines of each failed machine's log that are shown."""
TIMESTAMPED = re.compile(r"(\d{4}-\d\d-\d\dT[\d:.]+)Z (.*)")


def follow(cluster: Cluster, name: str) -> None:
    """Show what happens to a job until it ends.

    Raises:
        UserError: a machine's program refused its input, or a machine cannot start.
        WorkError: the job failed otherwise, or was deleted.
    """
    view = _JobView(cluster, name)
    while (job := cluster.trainjob(name)) is not None:
        pods = cluster.pods(name)
        view.update(pods)
        for condition in job.get("status", {}).get("conditions", []):
            if condition["status"] == "True" and condition["type"] == "Complete":
                return
            if condition["status"] == "True" and condition["type"] == "Failed":
                raise view.failure(pods, condition.get("message", ""))
        time.sleep(POLL)
    raise WorkError(f"TrainJob {name} failed: it was deleted")


class _JobView:
    """What has been shown of a job."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster, self.name = cluster, name
        self.start = self.read_at = time.monotonic()
        self.last_stamp = ""
        self.messages: set[str] = set()
        self.start_errors: dict[str, tuple[float, str]] = {}
        """Of each pod that cannot start: since when, and the first reason."""

    def update(self, pods: list[Any]) -> None:
        """Show what is new; `UserError` if a machine cannot start."""
        if not pods and time.monotonic() - self.start > NO_PODS_SECONDS:
            for warning in self.cluster.warnings(self.name):
                self._show(f"TrainJob {self.name} has no machine: {warning}")
        for pod in pods:
            self._check_start(pod)
            if pod.status.phase != "Pending" and pod.metadata.labels[INDEX] == "0":
                self._print_new_lines(pod)

    def _print_new_lines(self, pod: Any) -> None:
        now = time.monotonic()
        seconds = int(now - self.read_at) + 10
        for line in self.cluster.read_log(pod, timestamps=True, since_seconds=seconds):
            match = TIMESTAMPED.match(line)
            if match is not None and match[1] > self.last_stamp:
                print(match[2], file=sys.stderr, flush=True)
                self.last_stamp, self.read_at = match[1], now

    def _check_start(self, pod: Any) -> None:
        name, (reason, text) = pod.metadata.name, _waiting_reason(pod)
        if reason:
            self._show(f"{name} waits: {text}")
        if reason not in START_ERRORS:
            self.start_errors.pop(name, None)
            return
        since, first = self.start_errors.setdefault(name, (time.monotonic(), text))
        if time.monotonic() - since > START_SECONDS:
            minutes = f"{START_SECONDS / 60:.0f} minutes"
            raise UserError(f"{name}: has not started for {minutes}: {first}")

    def _show(self, message: str) -> None:
        if message not in self.messages:
            self.messages.add(message)
            log.warning("%s", message)

    def failure(self, pods: list[Any], reason: str) -> UserError | WorkError:
        """Print the last lines of each failed machine; return the error that says why."""
        reasons, shown = [reason], ""
        for pod in (pod for pod in pods if pod.status.phase == "Failed"):
            reason, message = _termination(pod)
            reasons.append(f"{pod.metadata.name}: {reason}")
            lines = self.cluster.read_log(pod, tail_lines=LAST_LINES)
            for line in (*lines, *message.split("\n")):
                if line.startswith(MISTAKE):  # one of several machines prints it
                    return UserError(line.removeprefix(MISTAKE))
            if any(lines):
                print(f"--- {reasons[-1]}", *lines, sep="\n", file=sys.stderr, flush=True)
                shown = "; its machines' last lines are above"
        return WorkError(f"TrainJob {self.name} failed: {'; '.join(reasons)}{shown}")


def _waiting_reason(pod: Any) -> tuple[str, str]:
    """Return why a pod does not run yet, also with Kubernetes' message; empty if it does."""
    causes = [status.state.waiting for status in pod.status.container_statuses or []]
    causes += [
        condition
        for condition in pod.status.conditions or []
        if condition.type == "PodScheduled" and condition.status == "False"
    ]
    for cause in causes:
        if cause is not None and cause.reason:
            return cause.reason, _join(": ", cause.reason, cause.message)
    return "", ""


def _termination(pod: Any) -> tuple[str, str]:
    """Return why a failed pod ended, and its program's own message."""
    reason, message = None, ""
    for status in pod.status.container_statuses or []:
        terminated = status.state.terminated
        if status.name == NODE and terminated is not None:
            message = (terminated.message or "").strip()
            end = f"{terminated.reason or 'ended'} (exit code {terminated.exit_code})"
            reason = _join("; ", end, message)
    # The pod's own reason: it was evicted, or its node was shut down.
    pod_reason = _join(": ", pod.status.reason, pod.status.message)
    return _join("; ", reason, pod_reason) or "lost, without a reason", message


def _join(separator: str, *parts: str | None) -> str:
    return separator.join(part for part in parts if part)
