"""A Kubernetes cluster with Kubeflow Trainer, as a step sees it: a TrainJob made, followed and removed.

Questions are asked again while Kubernetes fails for a while; its errors come out as one line.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from model_lib.errors import UserError, WorkError, first_line
from model_lib.retries import retry, status_may_pass

log = logging.getLogger(__name__)
GROUP, VERSION, PLURAL = "trainer.kubeflow.org", "v1alpha1", "trainjobs"
NODE = "node"
"""What the runtime calls its machines, and the container in them."""
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
QUIET = 60
"""Seconds without a line after which a log is asked for again: its connection may be gone unnoticed."""
POLL = 5.0
"""Seconds between two looks at a job."""
LAST_LINES = 20
"""Lines of each failed machine's log that are shown."""


@contextmanager
def told() -> Iterator[None]:
    """Say in one line what Kubernetes' own errors mean."""
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ApiException as error:
        with suppress(ValueError, TypeError):
            error.reason = json.loads(error.body)["message"]
        raise WorkError(f"Kubernetes refused: {error.reason} ({error.status})") from error
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
        """Let Kubernetes check a TrainJob without making it; `UserError` if it would refuse."""
        from kubernetes.client import ApiException

        create = self.objects.create_namespaced_custom_object
        try:
            with told():
                self._ask(create, *self._arguments(), document, dry_run="All", absent=409)
        except WorkError as error:
            if not isinstance(error.__cause__, ApiException):
                raise
            raise UserError(
                f"train_nodes: no TrainJob can be made here: {error}; kubectl apply -f deploy/trainer.yaml "
                "(docs/cluster.md) installs what it needs"
            ) from error

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
        try:
            self.require_trainer()
            self._require_alone(name)
            if self._condition(name)[0] is not None:
                log.warning("TrainJob %s of an attempt before is removed", name)
                self.remove(name)
            create = self.objects.create_namespaced_custom_object
            self._ask(create, *self._arguments(), document, absent=409)  # there: made by a try without an answer …
            self._require_alone(name)  # … or by another step at this moment
            log.warning("TrainJob %s on %d machines", name, document["spec"]["trainer"]["numNodes"])
            yield
        finally:
            try:
                if self._other_step(name) is None:
                    self.remove(name)
            except (ApiException, HTTPError) as error:
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

    def remove(self, name: str) -> None:
        """Remove a job with all that it made, and wait until it is gone."""
        delete = self.objects.delete_namespaced_custom_object
        self._ask(delete, *self._arguments(), name, propagation_policy="Foreground")
        deadline = time.monotonic() + 60
        while self._condition(name)[0] is not None and time.monotonic() < deadline:
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
        """Show the first machine's log until the job ends; `WorkError` with the last lines of all if it failed."""
        shown = ""
        while (state := self._condition(name))[0] == "":
            shown = self._show_log(name, shown)
            time.sleep(POLL)
        if state[0] == "Complete":
            self._show_log(name, shown)
            return
        for pod in self._pods(name):
            if pod.status.phase == "Failed":
                self._show_end(pod)
        raise WorkError(f"TrainJob {name} failed: {state[1] or 'without a reason'}; its machines' last lines are above")

    def _show_end(self, pod: Any) -> None:
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        with suppress(ApiException, HTTPError):  # a log may be gone with its machine
            last = self.core.read_namespaced_pod_log(
                pod.metadata.name, self.namespace, container=NODE, tail_lines=LAST_LINES, _request_timeout=QUIET
            )
            print(f"--- {pod.metadata.name}\n{last.rstrip()}", file=sys.stderr, flush=True)

    def _pods(self, name: str) -> list[Any]:
        labels = f"jobset.sigs.k8s.io/jobset-name={name},jobset.sigs.k8s.io/replicatedjob-name={NODE}"
        return list(self._ask(self.core.list_namespaced_pod, self.namespace, label_selector=labels).items)

    def _show_log(self, name: str, shown: str) -> str:
        """Print the first machine's log from the time `shown` on, while it runs; return the last line's time."""
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        first = [pod for pod in self._pods(name) if _index(pod) == 0 and pod.status.phase != "Pending"]
        if not first:
            return shown
        newest = max(first, key=lambda pod: str(pod.metadata.creation_timestamp))
        with suppress(ApiException, HTTPError):  # a connection that breaks is opened again at the next look
            stream = self.core.read_namespaced_pod_log(
                newest.metadata.name,
                self.namespace,
                container=NODE,
                follow=True,
                timestamps=True,
                _preload_content=False,
                _request_timeout=(QUIET, QUIET),
            )
            with closing(stream):
                for line in _lines(stream):
                    stamp, _, text = line.partition(" ")
                    if stamp > shown:
                        print(text, file=sys.stderr, flush=True)
                        shown = stamp
        return shown


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


def _lines(stream: Any) -> Iterator[str]:
    rest = b""
    for chunk in stream.stream():
        *whole, rest = (rest + chunk).split(b"\n")
        yield from (line.decode(errors="replace") for line in whole)
    if rest:
        yield rest.decode(errors="replace")
