"""A Kubernetes cluster with Kubeflow Trainer, as a step sees it: a TrainJob made, followed and removed.

Questions are asked again while Kubernetes fails for a while; its errors come out as one line.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from model_lib.errors import UserError, WorkError, first_line
from model_lib.exits import MISTAKE
from model_lib.retries import retry, status_may_pass

log = logging.getLogger(__name__)
GROUP, VERSION, PLURAL = "trainer.kubeflow.org", "v1alpha1", "trainjobs"
JOBSETS = ("jobset.x-k8s.io", "v1alpha2")
LABEL = "jobset.sigs.k8s.io/"
NODE = "node"
"""What the runtime calls its machines, and the container in them."""
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
TIMEOUT = 60
"""Seconds for which a log is waited for."""
POLL = 5.0
"""Seconds between two looks at a job."""
LAST_LINES = 60
"""Lines of each failed machine's log that are shown."""
MARGIN = 15.0
"""Seconds beyond its grace after which a pod that is deleted should be gone."""
STUCK = 600.0
"""Seconds after which a machine that cannot start fails the job …"""
REASONS = {
    "ErrImagePull": "ImagePullBackOff",
    "ImagePullBackOff": "ImagePullBackOff",
    "InvalidImageName": "InvalidImageName",
    "CreateContainerConfigError": "CreateContainerConfigError",
}
"""… for these reasons; the first two take turns."""


@contextmanager
def told() -> Iterator[None]:
    """Say in one line what Kubernetes' own errors mean.

    Raises:
        UserError: it refuses what was asked, and would refuse it again.
        WorkError: it fails or does not answer.
    """
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ApiException as error:
        with suppress(ValueError, TypeError):
            error.reason = json.loads(error.body)["message"]
        kind = WorkError if status_may_pass(error.status) else UserError
        raise kind(f"Kubernetes refused: {error.reason} ({error.status})") from error
    except HTTPError as error:
        raise WorkError(f"Kubernetes does not answer: {first_line(error)}") from error


class Cluster:
    """The cluster that this process runs in, or the one of KUBECONFIG."""

    def __init__(self) -> None:
        from kubernetes import client, config

        try:
            if ACCOUNT.exists():
                config.load_incluster_config()
                self.namespace = (ACCOUNT / "namespace").read_text().strip()
            else:
                file = os.environ.get("KUBECONFIG")
                config.load_kube_config(file)
                context = config.list_kube_config_contexts(file)[1]["context"]
                self.namespace = context.get("namespace", "default")
        except config.ConfigException as error:
            raise UserError(f"several machines: this is no Kubernetes cluster ({first_line(error)})") from error
        self.objects, self.core = client.CustomObjectsApi(), client.CoreV1Api()
        self.pod = os.environ.get("KFP_POD_NAME")

    def _ask(self, action: Callable[..., Any], *arguments: Any, absent: int = 404, **options: Any) -> Any:
        """Return Kubernetes' answer, asked again while it fails for a while; None for the status `absent`."""
        from kubernetes.client import ApiException

        try:
            return retry("Kubernetes", lambda: action(*arguments, **options), _passing)
        except ApiException as error:
            if error.status != absent:
                raise
            return None

    def require_trainer(self) -> None:
        if self._ask(self.objects.get_api_resources, GROUP, VERSION) is None:
            raise UserError(
                "train_nodes: this cluster has no Kubeflow Trainer, which several machines need; install it "
                "(docs/cluster.md), or train on one"
            )

    def rehearse(self, document: dict[str, Any]) -> None:
        """Let Kubernetes check a TrainJob without making it.

        Raises:
            UserError: it would refuse it.
            WorkError: it could not check it.
        """
        create = self.objects.create_namespaced_custom_object
        try:
            with told():
                self._ask(create, *self._arguments(), document, dry_run="All", absent=409)
        except UserError as error:
            raise UserError(
                f"train_nodes: no TrainJob can be made here: {error}; kubectl apply -f deploy/trainer.yaml "
                "(docs/cluster.md) installs the runtime and the rights that it needs"
            ) from error
        except WorkError as error:
            raise WorkError(f"train_nodes: no TrainJob can be checked: {error}; this may pass: start again") from error

    def account(self) -> str:
        """Return the service account of this pod."""
        if self.pod is None:
            return "default"
        pod = self._ask(self.core.read_namespaced_pod, self.pod, self.namespace)
        return "default" if pod is None else str(pod.spec.service_account_name)

    def owner(self) -> dict[str, Any] | None:
        """Return a reference to this pod: a job whose owner is deleted is removed by Kubernetes."""
        uid = os.environ.get("KFP_POD_UID")
        if self.pod is None or uid is None:
            return None
        return {"apiVersion": "v1", "kind": "Pod", "name": self.pod, "uid": uid}

    def _arguments(self) -> tuple[str, str, str, str]:
        return GROUP, VERSION, self.namespace, PLURAL

    @contextmanager
    def job(self, document: dict[str, Any]) -> Iterator[None]:
        """Make a TrainJob, after removing what an attempt before left; remove it after the body.

        What is left belongs to a pod that is gone, with which Kubernetes removes it sooner or later. `UserError` if it
        belongs to one that is at work, which keeps it.
        """
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        name = document["metadata"]["name"]
        self.require_trainer()
        self._require_alone(name)
        if self._condition(name)[0] is not None:
            log.warning("TrainJob %s of an attempt before is removed", name)
            self._delete(name)
        self._await_end(name)  # a machine of it may still save its checkpoint, in the same output
        try:
            create = self.objects.create_namespaced_custom_object
            self._ask(create, *self._arguments(), document, absent=409)  # there: made by a try without an answer …
            self._require_alone(name)  # … or by another step at this moment
            log.warning("TrainJob %s on %d machines", name, document["spec"]["trainer"]["numNodes"])
            yield
        finally:
            try:
                if self._other_step(name) is None:
                    self._delete(name)
                    self._await_end(name)
            except (ApiException, HTTPError, WorkError) as error:
                log.warning("TrainJob %s is not removed: %s; kubectl delete trainjob %s", name, first_line(error), name)

    def _require_alone(self, name: str) -> None:
        if (pod := self._other_step(name)) is not None:
            raise UserError(
                f"TrainJob {name}: the step in pod {pod} is at it; wait for its end, or choose another output"
            )

    def _other_step(self, name: str) -> str | None:
        """Return the pod that a job belongs to, if that is at work and another than this one."""
        job = self._ask(self.objects.get_namespaced_custom_object, *self._arguments(), name) or {"metadata": {}}
        for owner in job["metadata"].get("ownerReferences", []):
            pod = self._ask(self.core.read_namespaced_pod, owner["name"], self.namespace)
            if pod is None or pod.metadata.uid != owner["uid"] or owner["uid"] == os.environ.get("KFP_POD_UID"):
                continue
            if pod.metadata.deletion_timestamp is None and pod.status.phase in ("Pending", "Running"):
                return str(owner["name"])
        return None

    def _delete(self, name: str) -> None:
        """Delete a job, and in the background all that it made.

        Kubeflow Trainer (2.3) makes a JobSet again while its TrainJob waits for its dependents' end.
        """
        delete = self.objects.delete_namespaced_custom_object
        self._ask(delete, *self._arguments(), name, propagation_policy="Background")

    def _await_end(self, name: str) -> None:
        """Wait until no pod of a job of this name is left; `WorkError` after their grace and some seconds."""
        deadline = None
        while pods := self._pods(f"{LABEL}jobset-name={name}"):
            graces = [pod.spec.termination_grace_period_seconds or 30 for pod in pods]
            deadline = deadline or time.monotonic() + max(graces) + MARGIN
            if time.monotonic() > deadline:
                names = ", ".join(pod.metadata.name for pod in pods)
                raise WorkError(f"TrainJob {name}: its pods are not gone after their grace: kubectl delete pod {names}")
            time.sleep(POLL / 5)

    def _condition(self, name: str) -> tuple[str | None, str]:
        """Return how a job ended ("Complete" or "Failed"), "" if it has not, or None if there is none, and why."""
        job = self._ask(self.objects.get_namespaced_custom_object, *self._arguments(), name)
        if job is None:
            return None, "it was deleted"
        for condition in job.get("status", {}).get("conditions", []):
            if condition["status"] == "True" and condition["type"] in ("Complete", "Failed"):
                return condition["type"], condition.get("message", "")
        return "", ""

    def follow(self, name: str) -> None:
        """Show the first machine's log, and what machines wait for, until the job ends.

        Raises:
            UserError: a machine's program refused its input, or a machine could not start for `STUCK` seconds.
            WorkError: the job failed otherwise, or was deleted; the last lines of its machines are shown.
        """
        machines = _Machines(self)
        while (state := self._condition(name))[0] == "":
            machines.look(self._machines(name))
            time.sleep(POLL)
        pods = self._machines(name)
        machines.look(pods)
        if state[0] != "Complete":
            raise machines.failure(name, pods, state[1] or "without a reason")

    def _machines(self, name: str) -> list[Any]:
        """Return the pods of a job: of its own JobSet, as one of an earlier job has the same name."""
        job = self._ask(self.objects.get_namespaced_custom_object, *self._arguments(), name)
        get = self.objects.get_namespaced_custom_object
        jobset = job and self._ask(get, *JOBSETS, self.namespace, "jobsets", name)
        if not jobset or job["metadata"]["uid"] not in {
            o["uid"] for o in jobset["metadata"].get("ownerReferences", [])
        }:
            return []
        return self._pods(f"{LABEL}jobset-uid={jobset['metadata']['uid']},{LABEL}replicatedjob-name={NODE}")

    def _pods(self, labels: str) -> list[Any]:
        return list(self._ask(self.core.list_namespaced_pod, self.namespace, label_selector=labels).items)

    def read_log(self, pod: Any, **options: Any) -> str:
        """Return a machine's log, or nothing if it cannot be had: it may be gone with its node."""
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        try:
            return str(
                self.core.read_namespaced_pod_log(
                    pod.metadata.name, self.namespace, container=NODE, _request_timeout=TIMEOUT, **options
                )
            )
        except (ApiException, HTTPError):
            return ""


class _Machines:
    """What was shown of a job's machines so far."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.shown, self.looked = "", 0.0
        """Time of the last line that was shown, and when the log was read."""
        self.waits: set[tuple[str, str, str]] = set()
        self.stuck: dict[str, tuple[str, str, float]] = {}
        """Of each machine that cannot start: the reason, what was said of it first, and since when."""

    def look(self, pods: list[Any]) -> None:
        """Show what is new; `UserError` if a machine could not start for `STUCK` seconds."""
        for pod in pods:
            self._look_at_start(pod)
        first = [pod for pod in pods if _index(pod) == 0 and pod.status.phase != "Pending"]
        if not first:
            return
        now = time.monotonic()
        recent = {"since_seconds": int(now - self.looked) + 10} if self.looked else {}
        for line in self.cluster.read_log(first[0], timestamps=True, **recent).splitlines():
            stamp, _, text = line.partition(" ")
            if stamp.rstrip("Z") > self.shown:
                print(text, file=sys.stderr, flush=True)
                self.shown, self.looked = stamp.rstrip("Z"), now

    def _look_at_start(self, pod: Any) -> None:
        name, (reason, message) = pod.metadata.name, _waits_for(pod)
        if reason and (name, reason, message) not in self.waits:
            self.waits.add((name, reason, message))
            log.warning("%s waits: %s", name, f"{reason}: {message}" if message else reason)
        kind = REASONS.get(reason)
        if kind is None:
            self.stuck.pop(name, None)
            return
        known, said, since = self.stuck.get(name, ("", "", 0.0))
        if known != kind:
            self.stuck[name] = (kind, message, time.monotonic())
        elif time.monotonic() - since > STUCK:
            raise UserError(f"{name}: cannot start for {STUCK / 60:.0f} minutes: {kind}: {said}")

    def failure(self, name: str, pods: list[Any], reason: str) -> UserError | WorkError:
        """Show the last lines of each machine that failed; return the error that says why the job did."""
        ends, mistakes, codes, has_lines = [], [], set(), False
        for pod in pods:
            if pod.status.phase != "Failed":
                continue
            code, why, message = _end(pod)
            ends.append(f"{pod.metadata.name}: {why}")
            lines = self.cluster.read_log(pod, tail_lines=LAST_LINES).rstrip()
            if lines:
                has_lines = True
                print(f"--- {pod.metadata.name}: {why}\n{lines}", file=sys.stderr, flush=True)
            codes.add(code)
            mistakes += [line for line in f"{lines}\n{message}".splitlines() if line.startswith(MISTAKE)]
        if 2 in codes and mistakes:  # of several machines one tells the mistake, and the others end with its code
            return UserError(mistakes[-1].removeprefix(MISTAKE))
        text = f"TrainJob {name} failed: {'; '.join([reason, *ends])}"
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
    """Return the exit code of a machine's program, or -1, why the machine ended, and what it left as its message."""
    for status in pod.status.container_statuses or []:
        ended = status.state.terminated
        if status.name == NODE and ended is not None:
            message = (ended.message or "").strip()
            why = f"{ended.reason or 'ended'} (exit code {ended.exit_code})"
            return ended.exit_code, f"{why}: {message}" if message else why, message
    return -1, f"{pod.status.reason or 'lost'}: {pod.status.message or 'without a message'}", ""


def _passing(error: Exception) -> bool:
    """Return whether Kubernetes may answer the next time."""
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    if isinstance(error, ApiException):
        return status_may_pass(error.status)
    return isinstance(error, HTTPError)


def _index(pod: Any) -> int:
    labels = {**(pod.metadata.labels or {}), **(pod.metadata.annotations or {})}
    return int(labels.get("batch.kubernetes.io/job-completion-index", -1))
