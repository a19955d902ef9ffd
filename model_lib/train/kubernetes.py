"""A TrainJob in a Kubernetes cluster with Kubeflow Trainer: checked, created, deleted.

Transient errors of Kubernetes are retried; the others come out as one line.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from model_lib.errors import UserError, WorkError, first_line
from model_lib.io.errors import http_status, is_transient
from model_lib.io.retries import retry

log = logging.getLogger(__name__)
GROUP, VERSION = "trainer.kubeflow.org", "v1alpha1"
NODE = "node"
"""Name of the replicated job in our training runtime, and of its container."""
LABEL = "jobset.sigs.k8s.io/"
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
TIMEOUT = 60
"""Seconds that a request may take."""
POLL = 1.0
"""Seconds between two looks at what is being deleted."""
MARGIN = 15.0
"""Seconds beyond its grace period after which a deleted pod should be gone."""


@contextmanager
def kubernetes_errors() -> Iterator[None]:
    """Raise the Kubernetes client's exceptions as one line.

    Raises:
        UserError: Kubernetes refuses the request.
        WorkError: it fails or does not answer.
    """
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ApiException as error:
        message = error.reason
        with suppress(ValueError, TypeError, KeyError):
            message = json.loads(error.body)["message"]
        if is_transient(error):
            message = f"Kubernetes fails: {message} ({error.status}); try again later"
            raise WorkError(message) from error
        raise UserError(f"Kubernetes refused: {message} ({error.status})") from error
    except HTTPError as error:
        raise WorkError(f"Kubernetes does not answer: {first_line(error)}") from error


class Cluster:
    """The cluster in which this process is a pod, else the one of KUBECONFIG.

    Raises:
        UserError: there is none.
        WorkError: it does not answer.
    """

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
            reason = first_line(error)
            raise UserError(
                f"train_nodes: there is no Kubernetes cluster here ({reason})"
            ) from error
        self.objects, self.core = client.CustomObjectsApi(), client.CoreV1Api()
        self.trainjobs = (GROUP, VERSION, self.namespace, "trainjobs")
        self.jobsets = ("jobset.x-k8s.io", "v1alpha2", self.namespace, "jobsets")
        pod = os.environ.get("KFP_POD_NAME")
        self.pod = self._pod(pod) if pod else None

    @property
    def account(self) -> str:
        """Service account of this pod."""
        return "default" if self.pod is None else str(self.pod.spec.service_account_name)

    @property
    def owner(self) -> dict[str, str] | None:
        """Reference to this pod: Kubernetes deletes a job together with its owner."""
        if self.pod is None:
            return None
        metadata = self.pod.metadata
        return {"apiVersion": "v1", "kind": "Pod", "name": metadata.name, "uid": metadata.uid}

    def _request(self, action: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        with kubernetes_errors():
            action = partial(action, *arguments, _request_timeout=TIMEOUT, **options)
            return retry("Kubernetes", action)

    def _get(self, action: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Return Kubernetes' answer, or None if the object does not exist."""
        try:
            return self._request(action, *arguments, **options)
        except UserError as error:
            if http_status(error) != 404:
                raise
            return None

    def _pod(self, name: str) -> Any:
        return self._get(self.core.read_namespaced_pod, name, self.namespace)

    def _pods(self, labels: str) -> list[Any]:
        pods = self._request(self.core.list_namespaced_pod, self.namespace, label_selector=labels)
        return list(pods.items)

    def trainjob(self, name: str) -> dict[str, Any] | None:
        job: dict[str, Any] | None = self._get(
            self.objects.get_namespaced_custom_object, *self.trainjobs, name
        )
        return job

    def _jobset(self, name: str) -> dict[str, Any] | None:
        jobset: dict[str, Any] | None = self._get(
            self.objects.get_namespaced_custom_object, *self.jobsets, name
        )
        return jobset

    def _create(self, document: dict[str, Any], **options: Any) -> None:
        create = self.objects.create_namespaced_custom_object
        try:
            self._request(create, *self.trainjobs, document, **options)
        except UserError as error:
            if http_status(error) == 404:
                raise UserError("this cluster has no Kubeflow Trainer") from error
            if http_status(error) != 409:  # it exists: the answer to an earlier attempt was lost
                raise

    def dry_run(self, document: dict[str, Any]) -> None:
        """Let Kubernetes check a TrainJob without creating it.

        Raises:
            UserError: it would refuse it.
            WorkError: it fails or does not answer.
        """
        try:
            self._create(document, dry_run="All")
            self._jobset(document["metadata"]["name"])  # the step reads JobSets, too
        except UserError as error:
            raise UserError(
                f"train_nodes: no TrainJob can be created: {error}; if Kubeflow Trainer, its "
                "runtime or the rights to it are missing: docs/cluster.md, section 14"
            ) from error

    @contextmanager
    def job(self, document: dict[str, Any]) -> Iterator[None]:
        """Create a TrainJob in place of an earlier attempt's; delete it after the body.

        Raises:
            UserError: Kubernetes refuses it.
            WorkError: a running step uses a job of this name, or the earlier one does not end.
        """
        name = document["metadata"]["name"]
        self._refuse_other_step(name)
        self._delete(name)
        try:
            self._create(document)
            self._refuse_other_step(name)  # it may have created the job at the same moment
            log.warning("TrainJob %s on %d machines", name, document["spec"]["trainer"]["numNodes"])
            yield
        finally:
            try:
                if self._other_step(name) is None:
                    self._delete(name)
            except (UserError, WorkError) as error:
                log.warning("TrainJob %s may be left: %s", name, error)

    def _refuse_other_step(self, name: str) -> None:
        if (pod := self._other_step(name)) is not None:
            raise WorkError(
                f"TrainJob {name}: the step in pod {pod} is using it; wait until that ends, or "
                "choose another output"
            )

    def _other_step(self, name: str) -> str | None:
        """Return the name of the running pod that owns a job, unless it is this one."""
        job = self.trainjob(name) or {"metadata": {}}
        for owner in job["metadata"].get("ownerReferences", []):
            pod = self._pod(owner["name"])
            is_own = self.pod is not None and owner["uid"] == self.pod.metadata.uid
            if pod is None or is_own or pod.metadata.uid != owner["uid"]:
                continue
            is_running = pod.status.phase in ("Pending", "Running")
            if is_running and pod.metadata.deletion_timestamp is None:
                return str(owner["name"])
        return None

    def _delete(self, name: str) -> None:
        """Delete a job if it exists, and wait until its pods and its JobSet are gone.

        In the background: Kubeflow Trainer (2.3) creates a JobSet again while its TrainJob waits
        for its dependents. Until they are gone, pods may save a checkpoint where the next job
        starts from, and Trainer would take the JobSet for that of the next job.

        Raises:
            WorkError: they are still there after their grace period.
        """
        delete = self.objects.delete_namespaced_custom_object
        if self._get(delete, *self.trainjobs, name, propagation_policy="Background") is not None:
            log.warning("TrainJob %s is deleted", name)
        start, grace = time.monotonic(), 0
        while (pods := self._pods(f"{LABEL}jobset-name={name}")) or self._jobset(name) is not None:
            grace = max([grace, *(pod.spec.termination_grace_period_seconds or 30 for pod in pods)])
            if time.monotonic() - start > grace + MARGIN:
                left = ", ".join(pod.metadata.name for pod in pods) or "its JobSet"
                raise WorkError(f"TrainJob {name}: {left} does not end; delete it with kubectl")
            time.sleep(POLL)

    def job_pods(self, job: dict[str, Any] | None) -> list[Any]:
        """Return the machines' pods: those of the job's own JobSet, as an earlier job of the same
        name may have left some."""
        jobset = None if job is None else self._jobset(job["metadata"]["name"])
        if job is None or jobset is None:
            return []
        owners = {owner["uid"] for owner in jobset["metadata"].get("ownerReferences", [])}
        if job["metadata"]["uid"] not in owners:
            return []
        uid = jobset["metadata"]["uid"]
        return self._pods(f"{LABEL}jobset-uid={uid},{LABEL}replicatedjob-name={NODE}")

    def warnings(self, name: str) -> list[str]:
        """Return Kubernetes' warnings about a TrainJob, its JobSet and the Job in that."""
        list_events = self.core.list_namespaced_event
        events = self._request(list_events, self.namespace, field_selector="type=Warning").items
        names = (name, f"{name}-{NODE}-0")
        events = [event for event in events if event.involved_object.name in names]
        return [f"{event.reason}: {event.message}" for event in events]

    def read_log(self, pod: Any, **options: Any) -> list[str]:
        """Return the lines of a machine's log; none if it cannot be read, as from a lost node."""
        options |= {"container": NODE, "_preload_content": False, "_request_timeout": TIMEOUT}
        with suppress(UserError, WorkError), kubernetes_errors():
            name = pod.metadata.name
            response = self.core.read_namespaced_pod_log(name, self.namespace, **options)
            return str(response.data.decode(errors="replace")).rstrip().split("\n")
        return []
