"""A Kubernetes cluster with Kubeflow Trainer, as a step sees it: a TrainJob made, followed and
removed.

Questions are asked again while Kubernetes fails for a while; its errors come out as one line.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from model_lib.errors import UserError, WorkError, first_line
from model_lib.io.errors import is_transient
from model_lib.io.retries import retry
from model_lib.train.job_view import NODE, JobView

log = logging.getLogger(__name__)
GROUP, VERSION, PLURAL = "trainer.kubeflow.org", "v1alpha1", "trainjobs"
JOBSETS = ("jobset.x-k8s.io", "v1alpha2")
LABEL = "jobset.sigs.k8s.io/"
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
TIMEOUT = 60
"""Seconds for which an answer is waited for."""
POLL = 5.0
"""Seconds between two looks at a job."""
MARGIN = 15.0
"""Seconds beyond its grace after which a pod that is deleted should be gone."""


@contextmanager
def kubernetes_errors() -> Iterator[None]:
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
        kind = WorkError if is_transient(error) else UserError
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
            raise UserError(
                f"several machines: this is no Kubernetes cluster ({first_line(error)})"
            ) from error
        self.objects, self.core = client.CustomObjectsApi(), client.CoreV1Api()
        self.pod = os.environ.get("KFP_POD_NAME")

    def _ask(
        self, action: Callable[..., Any], *arguments: Any, absent: int = 404, **options: Any
    ) -> Any:
        """Return Kubernetes' answer, asked again while it fails for a while; None for the status
        `absent`."""
        from kubernetes.client import ApiException

        try:
            return retry(
                "Kubernetes", lambda: action(*arguments, _request_timeout=TIMEOUT, **options)
            )
        except ApiException as error:
            if error.status != absent:
                raise
            return None

    def require_trainer(self) -> None:
        """Raise `UserError` unless Kubeflow Trainer is installed."""
        if self._ask(self.objects.get_api_resources, GROUP, VERSION) is None:
            raise UserError(
                "train_nodes: this cluster has no Kubeflow Trainer, which several machines need; "
                "install it "
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
            with kubernetes_errors():
                self._ask(create, *self._arguments(), document, dry_run="All", absent=409)
                self._jobset(document["metadata"]["name"])  # which the step looks at, too
        except UserError as error:
            raise UserError(
                f"train_nodes: no TrainJob can be made here: {error}; kubectl apply -f "
                "deploy/trainer.yaml "
                "(docs/cluster.md) installs the runtime and the rights that it needs"
            ) from error
        except WorkError as error:
            raise WorkError(
                f"train_nodes: no TrainJob can be checked: {error}; this may pass: start again"
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

        What is left belongs to a pod that is gone, with which Kubernetes removes it sooner or
        later.

        Raises:
            WorkError: it belongs to a step that is at work, which keeps it, or does not end.
        """
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        name = document["metadata"]["name"]
        self.require_trainer()
        self._require_alone(name)
        if self._condition(name)[0] is not None:
            log.warning("TrainJob %s of an attempt before is removed", name)
            self._delete(name)
        self._await_end(name)
        try:
            create = self.objects.create_namespaced_custom_object
            self._ask(
                create, *self._arguments(), document, absent=409
            )  # there: made by a try without an answer …
            self._require_alone(name)  # … or by another step at this moment
            log.warning("TrainJob %s on %d machines", name, document["spec"]["trainer"]["numNodes"])
            yield
        finally:
            try:
                if self._other_step(name) is None:
                    self._delete(name)
                    self._await_end(name)
            except WorkError as error:
                log.warning("%s", error)
            except (ApiException, HTTPError) as error:
                log.warning(
                    "TrainJob %s is not removed: %s; kubectl delete trainjob %s",
                    name,
                    first_line(error),
                    name,
                )

    def _require_alone(self, name: str) -> None:
        if (pod := self._other_step(name)) is not None:
            raise WorkError(
                f"TrainJob {name}: the step in pod {pod} is at it; wait for its end, or choose "
                "another output"
            )

    def _other_step(self, name: str) -> str | None:
        """Return the pod that a job belongs to, if that is at work and another than this one."""
        job = self._ask(self.objects.get_namespaced_custom_object, *self._arguments(), name) or {
            "metadata": {}
        }
        for owner in job["metadata"].get("ownerReferences", []):
            pod = self._ask(self.core.read_namespaced_pod, owner["name"], self.namespace)
            if (
                pod is None
                or pod.metadata.uid != owner["uid"]
                or owner["uid"] == os.environ.get("KFP_POD_UID")
            ):
                continue
            if pod.metadata.deletion_timestamp is None and pod.status.phase in (
                "Pending",
                "Running",
            ):
                return str(owner["name"])
        return None

    def _delete(self, name: str) -> None:
        """Delete a job, and in the background all that it made.

        Kubeflow Trainer (2.3) makes a JobSet again while its TrainJob waits for its dependents'
        end.
        """
        delete = self.objects.delete_namespaced_custom_object
        self._ask(delete, *self._arguments(), name, propagation_policy="Background")

    def _await_end(self, name: str) -> None:
        """Wait until nothing is left of a job of this name; `WorkError` after its pods' grace and
        some seconds.

        Its machines may still save a checkpoint, in the output that the next job goes on from, and
        Kubeflow Trainer (2.3) would take a JobSet that is left, with its end, for that of the next
        job.
        """
        began, grace = time.monotonic(), 0
        while (pods := self._pods(f"{LABEL}jobset-name={name}")) or self._jobset(name) is not None:
            grace = max([grace, *(pod.spec.termination_grace_period_seconds or 30 for pod in pods)])
            if time.monotonic() - began > grace + MARGIN:
                left = ", ".join(pod.metadata.name for pod in pods) or "its JobSet"
                raise WorkError(
                    f"TrainJob {name}: still there after its end: {left}; delete that with kubectl"
                )
            time.sleep(POLL / 5)

    def _condition(self, name: str) -> tuple[str | None, str]:
        """Return how a job ended ("Complete" or "Failed"), "" if it has not, or None if there is
        none, and why."""
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
            UserError: a machine's program refused its input, or a machine did not start for `STUCK`
                seconds.
            WorkError: the job failed otherwise, or was deleted; the last lines of its machines are
                shown.
        """
        view = JobView(name, self.read_log, self.warnings)
        while (state := self._condition(name))[0] == "":
            view.update(self._job_pods(name))
            time.sleep(POLL)
        pods = self._job_pods(name)
        view.update(pods)
        if state[0] != "Complete":
            raise view.failure(pods, state[1] or "without a reason")

    def _job_pods(self, name: str) -> list[Any]:
        """Return the pods of a job: of its own JobSet, as one of an earlier job has the same
        name."""
        job = self._ask(self.objects.get_namespaced_custom_object, *self._arguments(), name)
        jobset = self._jobset(name)
        if job is None or jobset is None:
            return []
        owners = {owner["uid"] for owner in jobset["metadata"].get("ownerReferences", [])}
        if job["metadata"]["uid"] not in owners:
            return []
        return self._pods(
            f"{LABEL}jobset-uid={jobset['metadata']['uid']},{LABEL}replicatedjob-name={NODE}"
        )

    def _jobset(self, name: str) -> dict[str, Any] | None:
        get = self.objects.get_namespaced_custom_object
        found: dict[str, Any] | None = self._ask(get, *JOBSETS, self.namespace, "jobsets", name)
        return found

    def _pods(self, labels: str) -> list[Any]:
        return list(
            self._ask(self.core.list_namespaced_pod, self.namespace, label_selector=labels).items
        )

    def warnings(self, name: str) -> list[str]:
        """Return what Kubernetes has against a job's TrainJob, its JobSet and the Job in that."""
        events = self._ask(
            self.core.list_namespaced_event, self.namespace, field_selector="type=Warning"
        )
        of_job = [
            event
            for event in events.items
            if event.involved_object.name in (name, f"{name}-{NODE}-0")
        ]
        return [f"{event.reason}: {event.message}" for event in of_job]

    def read_log(self, pod: Any, **options: Any) -> list[str]:
        """Return the lines of a machine's log, or none if it cannot be had: it may be gone with its
        node."""
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        options |= {"container": NODE, "_preload_content": False, "_request_timeout": TIMEOUT}
        try:
            answer = self.core.read_namespaced_pod_log(pod.metadata.name, self.namespace, **options)
            return str(answer.data.decode(errors="replace")).rstrip().split("\n")
        except (ApiException, HTTPError):
            return []
