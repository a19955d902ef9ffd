"""What a step shows of a TrainJob: its first machine's log, what machines wait for, and why they
ended."""

import logging
import re
import sys
import time
from collections.abc import Callable
from typing import Any

from model_lib.errors import UserError, WorkError
from model_lib.exits import MISTAKE

log = logging.getLogger(__name__)
NODE = "node"
"""What the runtime calls its machines, and the container in them."""
LAST_LINES = 60
"""Lines of each failed machine's log that are shown."""
STUCK = 600.0
"""Seconds after which a machine that does not start for one of `REASONS` fails the job."""
REASONS = {
    "ErrImagePull": "ImagePullBackOff",  # Kubernetes shows both in turn
    "ImagePullBackOff": "ImagePullBackOff",
    "InvalidImageName": "InvalidImageName",
    "CreateContainerConfigError": "CreateContainerConfigError",
}
NO_PODS = 60.0
"""Seconds without any pod after which the events that may say why are shown."""
STAMP = re.compile(r"(\d{4}-\d\d-\d\dT[\d:.]+)Z (.*)")
"""A line of a log with its time."""


class JobView:
    """What was shown of a job so far.

    Args:
        name: of the job.
        read_log: returns the lines of a pod's log, given options of Kubernetes' request for it.
        warnings: returns what Kubernetes has against a job, given its name.
    """

    def __init__(
        self, name: str, read_log: Callable[..., list[str]], warnings: Callable[[str], list[str]]
    ) -> None:
        self.name, self.read_log, self.warnings = name, read_log, warnings
        self.began = time.monotonic()
        self.last_stamp, self.read_at = "", 0.0
        """Time of the last line that was shown, and when it was read."""
        self.shown: set[str] = set()
        """What was said of machines that wait."""
        self.stuck: dict[str, tuple[str, str, float]] = {}
        """Of each machine that does not start: the reason, its first message, and since when."""

    def update(self, pods: list[Any]) -> None:
        """Show what is new; `UserError` if a machine did not start for `STUCK` seconds."""
        if not pods and time.monotonic() - self.began > NO_PODS:
            for warning in self.warnings(self.name):
                self._show(f"TrainJob {self.name} has no machine: {warning}")
        for pod in pods:
            self._check_start(pod)
        first = [pod for pod in pods if _index(pod) == 0 and pod.status.phase != "Pending"]
        if not first:
            return
        now = time.monotonic()
        recent = {"since_seconds": int(now - self.read_at) + 10} if self.read_at else {}
        for line in self.read_log(first[0], timestamps=True, **recent):
            stamped = STAMP.match(line)
            if stamped is not None and stamped[1] > self.last_stamp:
                print(stamped[2], file=sys.stderr, flush=True)
                self.last_stamp, self.read_at = stamped[1], now

    def _check_start(self, pod: Any) -> None:
        name, (reason, message) = pod.metadata.name, _waits_for(pod)
        if reason:
            self._show(f"{name} waits: {reason}" + (f": {message}" if message else ""))
        kind = REASONS.get(reason)
        if kind is None:
            self.stuck.pop(name, None)
            return
        known, first_message, since = self.stuck.setdefault(name, (kind, message, time.monotonic()))
        if known != kind:
            self.stuck[name] = (kind, message, time.monotonic())
        elif time.monotonic() - since > STUCK:
            raise UserError(
                f"{name}: has not started for {STUCK / 60:.0f} minutes: {kind}: {first_message}"
            )

    def _show(self, text: str) -> None:
        if text not in self.shown:
            self.shown.add(text)
            log.warning("%s", text)

    def failure(self, pods: list[Any], reason: str) -> UserError | WorkError:
        """Show the last lines of each machine that failed; return the error that says why the job
        did."""
        ends, mistakes, codes, has_lines = [], [], set(), False
        for pod in pods:
            if pod.status.phase != "Failed":
                continue
            code, why, message = _end(pod)
            ends.append(f"{pod.metadata.name}: {why}")
            lines = self.read_log(pod, tail_lines=LAST_LINES)
            if any(lines):
                has_lines = True
                print(
                    f"--- {pod.metadata.name}: {why}", *lines, sep="\n", file=sys.stderr, flush=True
                )
            codes.add(code)
            mistakes += [
                line for line in (*lines, *message.split("\n")) if line.startswith(MISTAKE)
            ]
        if (
            2 in codes and mistakes
        ):  # of several machines one tells the mistake, and the others end with its code
            return UserError(mistakes[-1].removeprefix(MISTAKE))
        text = f"TrainJob {self.name} failed: {'; '.join([reason, *ends])}"
        return WorkError(text + ("; its machines' last lines are above" if has_lines else ""))


def _waits_for(pod: Any) -> tuple[str, str]:
    """Return why a pod does not run yet, and what Kubernetes says of it; nothing if it does."""
    for status in pod.status.container_statuses or []:
        if status.state.waiting is not None:
            return status.state.waiting.reason or "", status.state.waiting.message or ""
    for condition in pod.status.conditions or []:
        if condition.type == "PodScheduled" and condition.status == "False":
            return condition.reason or "", condition.message or ""
    return "", ""


def _end(pod: Any) -> tuple[int, str, str]:
    """Return the exit code of a machine's program, or -1, why the machine ended, and what the
    program left of it."""
    code, reasons, message = -1, [], ""
    for status in pod.status.container_statuses or []:
        ended = status.state.terminated
        if status.name == NODE and ended is not None:
            code, message = ended.exit_code, (ended.message or "").strip()
            reasons += [
                f"{ended.reason or 'ended'} (exit code {code})",
                *([message] if message else []),
            ]
    if pod.status.reason:  # of the pod as a whole: evicted, or its node was shut down
        reasons.append(": ".join(text for text in (pod.status.reason, pod.status.message) if text))
    return code, "; ".join(reasons) or "lost, without a reason", message


def _index(pod: Any) -> int:
    labels = {**(pod.metadata.labels or {}), **(pod.metadata.annotations or {})}
    return int(labels.get("batch.kubernetes.io/job-completion-index", -1))
