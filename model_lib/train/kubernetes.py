"""A TrainJob in a Kubernetes cluster with Kubeflow Trainer: checked, created, deleted."""

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
"""Seconds between two looks at a job that is being deleted."""
DELETION_SECONDS = 135.0
"""Time after which a deleted job's pods should be gone; their grace period is 120 seconds."""


class Cluster:
    """The cluster in which this process is a pod, else the one of KUBECONFIG.

    Raises:
        UserError: there is none.
        WorkError: it does not answer.
    """

    account = "default"
    """Service account of this pod."""
    owners: tuple[dict[str, str], ...] = ()
    """Reference to this pod: Kubernetes deletes a job together with its owner."""

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
        pod = self._pod(os.environ.get("KFP_POD_NAME", ""))
        if pod is not None:
            self.account = pod.spec.service_account_name
            reference = {"name": pod.metadata.name, "uid": pod.metadata.uid}
            self.owners = ({"apiVersion": "v1", "kind": "Pod", **reference},)

    def _request(self, action: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Return Kubernetes' answer, or None if the object does not exist.

        Raises:
            UserError: Kubernetes refuses the request.
            WorkError: it fails or does not answer.
        """
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        action = partial(action, *arguments, _request_timeout=TIMEOUT, **options)
        try:
            return retry("Kubernetes", action)
        except ApiException as error:
            if error.status == 404:
                return None
            message = error.reason
            with suppress(ValueError, TypeError, KeyError):
                message = json.loads(error.body)["message"]
            if is_transient(error):
                message = f"Kubernetes fails: {message} ({error.status}); try again later"
                raise WorkError(message) from error
            raise UserError(f"Kubernetes refused: {message} ({error.status})") from error
        except HTTPError as error:
            raise WorkError(f"Kubernetes does not answer: {first_line(error)}") from error

    def _pod(self, name: str) -> Any:
        return self._request(self.core.read_namespaced_pod, name, self.namespace) if name else None

    def _object(self, kind: tuple[str, ...], name: str) -> dict[str, Any] | None:
        get = self.objects.get_namespaced_custom_object
        document: dict[str, Any] | None = self._request(get, *kind, name)
        return document

    def trainjob(self, name: str) -> dict[str, Any] | None:
        return self._object(self.trainjobs, name)

    def pods(self, job: str) -> list[Any]:
        """Return the pods of a TrainJob's machines."""
        labels = f"{LABEL}jobset-name={job},{LABEL}replicatedjob-name={NODE}"
        pods = self._request(self.core.list_namespaced_pod, self.namespace, label_selector=labels)
        return list(pods.items)

    def _create(self, document: dict[str, Any], **options: Any) -> None:
        create = self.objects.create_namespaced_custom_object
        try:
            answer = self._request(create, *self.trainjobs, document, **options)
        except UserError as error:
            if http_status(error) != 409:  # it exists: the answer to an earlier attempt was lost
                raise
        else:
            if answer is None:
                raise UserError("this cluster has no Kubeflow Trainer")

    def dry_run(self, document: dict[str, Any]) -> None:
        """Let Kubernetes check a TrainJob without creating it.

        Raises:
            UserError: it would refuse it.
            WorkError: it fails or does not answer.
        """
        try:
            self._create(document, dry_run="All")
            self._object(self.jobsets, document["metadata"]["name"])  # the step reads JobSets, too
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
                self._refuse_other_step(name)
                self._delete(name)
            except (UserError, WorkError) as error:
                log.warning("TrainJob %s is not deleted: %s", name, error)

    def _refuse_other_step(self, name: str) -> None:
        """Raise `WorkError` if a job belongs to another running pod."""
        job = self.trainjob(name) or {"metadata": {}}
        own = [owner["uid"] for owner in self.owners]
        for owner in job["metadata"].get("ownerReferences", []):
            pod = None if owner["uid"] in own else self._pod(owner["name"])
            if pod is None or pod.metadata.deletion_timestamp is not None:
                continue
            if pod.status.phase in ("Pending", "Running"):
                raise WorkError(
                    f"TrainJob {name}: the step in pod {owner['name']} is using it; wait until "
                    "that ends, or choose another output"
                )

    def _delete(self, name: str) -> None:
        """Delete a job if it exists, and wait until its pods and its JobSet are gone.

        In the background: Kubeflow Trainer (2.3) creates a JobSet again while its TrainJob waits
        for its dependents. Until they are gone, pods may save a checkpoint where the next job
        starts from, and Trainer would take the JobSet for that of the next job.

        Raises:
            WorkError: they are still there after their grace period.
        """
        delete = self.objects.delete_namespaced_custom_object
        if self._request(delete, *self.trainjobs, name, propagation_policy="Background"):
            log.warning("TrainJob %s is deleted", name)
        deadline = time.monotonic() + DELETION_SECONDS
        while (pods := self.pods(name)) or self._object(self.jobsets, name) is not None:
            if time.monotonic() > deadline:
                left = ", ".join(pod.metadata.name for pod in pods) or "its JobSet"
                raise WorkError(f"TrainJob {name}: {left} does not end; delete it with kubectl")
            time.sleep(POLL)

    def warnings(self, name: str) -> list[str]:
        """Return Kubernetes' warnings about a TrainJob, its JobSet and the Job in that."""
        list_events = self.core.list_namespaced_event
        events = self._request(list_events, self.namespace, field_selector="type=Warning").items
        names = (name, f"{name}-{NODE}-0")
        events = [event for event in events if event.involved_object.name in names]
        return [f"{event.reason}: {event.message}" for event in events]

    def read_log(self, pod: Any, **options: Any) -> list[str]:
        """Return the lines of a machine's log; none if it cannot be read, as from a lost node."""
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        options |= {"container": NODE, "_preload_content": False, "_request_timeout": TIMEOUT}
        read = self.core.read_namespaced_pod_log
        with suppress(ApiException, HTTPError):
            response = read(pod.metadata.name, self.namespace, **options)
            return str(response.data.decode(errors="replace")).rstrip().split("\n")
        return []
