"""Training on several machines of a cluster, through Kubeflow Trainer: a TrainJob made, followed and removed.

The job's machines run `captioner train` under torchrun, and go on from the candidate's checkpoints like any other run.
What is seen here is one machine's log and the job's end. The names are those of Kubeflow Trainer 2.3.
"""

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_lib import storage
from model_lib.errors import UserError, WorkError, first_line
from model_lib.options import as_arguments
from model_lib.patience import ask_again
from model_lib.train.config import TrainConfig

log = logging.getLogger(__name__)
GROUP, VERSION, PLURAL = "trainer.kubeflow.org", "v1alpha1", "trainjobs"
RUNTIME = "captioner"
"""The training runtime in `deploy/trainer.yaml`. Kubeflow Trainer's own starts a failed machine again and again."""
NODE = "node"
"""What the runtime calls its machines, and the container in them."""
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
PASSED_ON = ("KFP_RUN_ID", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID")
"""Variables of the step that its machines need too: what a server gives, not what comes from a secret."""
QUIET = 60
"""Seconds without a line after which a log is asked for again: its connection may be gone unnoticed."""
POLL = 5.0
"""Seconds between two looks at a job."""
LAST_LINES = 20
"""Lines of each failed machine's log that are shown."""


@dataclass(frozen=True)
class Machines:
    """Where and with what each machine of a job runs.

    Args:
        count: number of machines.
        image: of the container.
        cpu: cores requested.
        memory: GiB, requested and limit.
        gpu_resource: what the container asks for, "nvidia.com/gpu" …
        gpu_count: … and how many.
        node_selector: labels of the nodes.
        tolerations: of the nodes' taints.
        secret: name of the Kubernetes secret …
        secret_variables: … and the variable that each of its keys becomes.
        user: user and group of the process.
    """

    count: int
    image: str
    cpu: int
    memory: int
    gpu_resource: str
    gpu_count: int
    node_selector: Mapping[str, str]
    tolerations: list[dict[str, Any]]
    secret: str
    secret_variables: Mapping[str, str]
    user: int


def job_document(
    name: str, config: TrainConfig, machines: Machines, account: str, owner: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return the TrainJob that trains a candidate, as Kubernetes takes it.

    Args:
        name: of the job.
        config: of the candidate.
        machines: that it runs on.
        account: the Kubernetes service account whose rights they have.
        owner: reference to the pod with which the job goes, should nobody else remove it.
    """
    memory = {"memory": f"{machines.memory}Gi"}
    gpus = {machines.gpu_resource: str(machines.gpu_count)} if machines.gpu_count else {}
    secrets = [
        {"name": variable, "valueFrom": {"secretKeyRef": {"name": machines.secret, "key": key, "optional": True}}}
        for key, variable in machines.secret_variables.items()
    ]
    plain = [{"name": name, "value": os.environ[name]} for name in PASSED_ON if name in os.environ]
    pod = {
        "serviceAccountName": account,
        "nodeSelector": dict(machines.node_selector),
        "tolerations": machines.tolerations,
        "securityContext": {"runAsUser": machines.user, "runAsGroup": machines.user, "runAsNonRoot": True},
        "volumes": [
            {"name": "tmp", "emptyDir": {}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}},
        ],
        "containers": [
            {
                "name": NODE,
                "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}, {"name": "shm", "mountPath": "/dev/shm"}],
            }
        ],
    }
    replicated = {"name": NODE, "template": {"spec": {"template": {"spec": pod}}}}
    patch = {"manager": "captioner", "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [replicated]}}}}
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "TrainJob",
        "metadata": {"name": name, **({"ownerReferences": [owner]} if owner else {})},
        "spec": {
            "runtimeRef": {"apiGroup": GROUP, "kind": "TrainingRuntime", "name": RUNTIME},
            "trainer": {
                "image": machines.image,
                "command": ["python", "-m", "torch.distributed.run", "-m", "model_lib", "train"],
                "args": as_arguments(config),
                "env": [*plain, *secrets],
                "numNodes": machines.count,
                "numProcPerNode": config.processes or machines.gpu_count or 1,
                "resourcesPerNode": {
                    "requests": {"cpu": str(machines.cpu), **memory, **gpus},
                    "limits": {"cpu": str(2 * machines.cpu), **memory, **gpus},
                },
            },
            "runtimePatches": [patch],
        },
    }


def train_on(machines: Machines, config: TrainConfig, fingerprint: str) -> dict[str, Any]:
    """Train a candidate on several machines; return the URI of its best model as `model`, and what is written in it.

    The job is named after the candidate and its data, so that a second attempt finds what the first one left.

    Raises:
        UserError: this is no cluster, or one without Kubeflow Trainer.
        WorkError: the job failed, or could not be made or followed.
    """
    name = f"captioner-{config.key(fingerprint)}"
    with _terminable(), _told():
        cluster = _Cluster()
        with cluster.job(job_document(name, config, machines, cluster.account(), cluster.owner())):
            cluster.follow(name)
    best = storage.join(config.output, "best")
    return {"model": best, **storage.read_json(storage.join(best, "training.json"))}


def require_trainer() -> None:
    """Raise `UserError` unless this is a cluster with Kubeflow Trainer."""
    with _told():
        _Cluster().require_trainer()


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the process by the way out, on which the job is removed."""

    def stop(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _told() -> Iterator[None]:
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


class _Cluster:
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
            return ask_again("Kubernetes", lambda: action(*arguments, **options), _passing)
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

        What is left belongs to a pod that is gone, with which Kubernetes removes it sooner or later.
        """
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        name = document["metadata"]["name"]
        try:
            self.require_trainer()
            if self._condition(name)[0] is not None:
                log.warning("TrainJob %s of an attempt before is removed", name)
                self.remove(name)
            create = self.objects.create_namespaced_custom_object
            self._ask(create, *self._arguments(), document, absent=409)  # there: made by a try without an answer
            log.warning("TrainJob %s on %d machines", name, document["spec"]["trainer"]["numNodes"])
            yield
        finally:
            try:
                self.remove(name)
            except (ApiException, HTTPError) as error:
                log.warning("TrainJob %s is not removed: %s; kubectl delete trainjob %s", name, first_line(error), name)

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
        return error.status == 429 or error.status >= 500
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
