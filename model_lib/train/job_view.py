"""What a step shows of a TrainJob: its first machine's log, what machines wait for, why they
ended."""

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
START_ERRORS = (
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "CreateContainerConfigError",
)
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
    end = None
    while end is None:
        job = cluster.trainjob(name)
        end = _end(job)
        pods = cluster.job_pods(job)
        view.update(pods)
        if end is None:
            time.sleep(POLL)
    if end[0] != "Complete":
        raise view.failure(pods, end[1] or "without a reason")


class _JobView:
    """What has been shown of a job."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster, self.name = cluster, name
        self.start = time.monotonic()
        self.last_stamp = ""
        self.read_at: float | None = None
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
        options: dict[str, Any] = {"timestamps": True}
        if self.read_at is not None:
            options["since_seconds"] = int(now - self.read_at) + 10
        for line in self.cluster.read_log(pod, **options):
            match = TIMESTAMPED.match(line)
            if match is not None and match[1] > self.last_stamp:
                print(match[2], file=sys.stderr, flush=True)
                self.last_stamp, self.read_at = match[1], now

    def _check_start(self, pod: Any) -> None:
        name, (reason, message) = pod.metadata.name, _waiting_reason(pod)
        text = f"{reason}: {message}" if message else reason
        if reason:
            self._show(f"{name} waits: {text}")
        if reason not in START_ERRORS:
            self.start_errors.pop(name, None)
            return
        since, first = self.start_errors.setdefault(name, (time.monotonic(), text))
        if time.monotonic() - since > START_SECONDS:
            raise UserError(
                f"{name}: has not started for {START_SECONDS / 60:.0f} minutes: {first}"
            )

    def _show(self, message: str) -> None:
        if message not in self.messages:
            self.messages.add(message)
            log.warning("%s", message)

    def failure(self, pods: list[Any], reason: str) -> UserError | WorkError:
        """Print the last lines of each failed machine; return the error that says why."""
        reasons, codes, mistakes, has_lines = [reason], set(), [], False
        for pod in pods:
            if pod.status.phase != "Failed":
                continue
            code, why, message = _termination(pod)
            reasons.append(f"{pod.metadata.name}: {why}")
            lines = self.cluster.read_log(pod, tail_lines=LAST_LINES)
            if any(lines):
                has_lines = True
                heading = f"--- {pod.metadata.name}: {why}"
                print(heading, *lines, sep="\n", file=sys.stderr, flush=True)
            codes.add(code)
            mistakes += [ln for ln in (*lines, *message.split("\n")) if ln.startswith(MISTAKE)]
        if 2 in codes and mistakes:  # one of several machines prints it
            return UserError(mistakes[-1].removeprefix(MISTAKE))
        text = f"TrainJob {self.name} failed: {'; '.join(reasons)}"
        return WorkError(f"{text}; its machines' last lines are above" if has_lines else text)


def _end(job: dict[str, Any] | None) -> tuple[str, str] | None:
    """Return "Complete" or "Failed", and why; None for a job that has not ended."""
    if job is None:
        return "Failed", "it was deleted"
    for condition in job.get("status", {}).get("conditions", []):
        if condition["status"] == "True" and condition["type"] in ("Complete", "Failed"):
            return condition["type"], condition.get("message", "")
    return None


def _waiting_reason(pod: Any) -> tuple[str, str]:
    """Return why a pod does not run yet, and Kubernetes' message; empty if it does."""
    for status in pod.status.container_statuses or []:
        if status.state.waiting is not None:
            return status.state.waiting.reason or "", status.state.waiting.message or ""
    for condition in pod.status.conditions or []:
        if condition.type == "PodScheduled" and condition.status == "False":
            return condition.reason or "", condition.message or ""
    return "", ""


def _termination(pod: Any) -> tuple[int, str, str]:
    """Return a failed pod's exit code, or -1; why it ended; and its program's own message."""
    code, reasons, message = -1, [], ""
    for status in pod.status.container_statuses or []:
        terminated = status.state.terminated
        if status.name == NODE and terminated is not None:
            code, message = terminated.exit_code, (terminated.message or "").strip()
            reasons = [f"{terminated.reason or 'ended'} (exit code {code})", message]
    if pod.status.reason:  # of the whole pod: evicted, or its node was shut down
        reasons.append(": ".join(filter(None, (pod.status.reason, pod.status.message))))
    return code, "; ".join(filter(None, reasons)) or "lost, without a reason", message
