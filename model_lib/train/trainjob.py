"""Training on several machines of a cluster, through Kubeflow Trainer: a TrainJob made, followed
and removed.

The job's machines run `captioner train`, and go on from the candidate's checkpoints like any other
run. What is seen here is one machine's log and the job's end. The names are those of Kubeflow
Trainer 2.3.
"""

import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

from model_lib.errors import UserError
from model_lib.io import storage
from model_lib.options import as_arguments
from model_lib.train.cluster import GROUP, VERSION, Cluster, kubernetes_errors
from model_lib.train.config import TrainConfig
from model_lib.train.job_view import NODE

RUNTIME = {"apiGroup": GROUP, "kind": "TrainingRuntime", "name": "captioner"}
"""The training runtime in `deploy/trainer.yaml`. Kubeflow Trainer's own starts a failed machine
again and again."""
MANAGER = "captioner.example/train"
"""Who patches the runtime: Kubeflow Trainer's webhook takes a domain and a path only."""
PLACEMENT = ("gpu_node_selector", "gpu_tolerations")
"""Parameters of a pipeline that place all of a machine."""
PASSED_ON = ("KFP_RUN_ID", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID")
"""Variables of the step that its machines need too: what a server gives, not what comes from a
secret."""


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

    @classmethod
    def from_parameters(
        cls, *, nodes: int, gpu_count: str, secret_name: str, **parameters: Any
    ) -> Self:
        """Make it of a pipeline's parameters; `UserError` if the count of GPUs, a text for KFP's
        sake, is no number."""
        if not gpu_count.isdecimal():
            raise UserError(f"gpu_count {gpu_count!r}: is not a whole number, as text")
        placed = {
            name.removeprefix("gpu_") if name in PLACEMENT else name: value
            for name, value in parameters.items()
        }
        return cls(count=nodes, gpu_count=int(gpu_count), secret=secret_name, **placed)


def job_document(
    name: str,
    config: TrainConfig,
    machines: Machines,
    account: str,
    owner: dict[str, Any] | None = None,
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
        {
            "name": variable,
            "valueFrom": {"secretKeyRef": {"name": machines.secret, "key": key, "optional": True}},
        }
        for key, variable in machines.secret_variables.items()
    ]
    plain = [{"name": name, "value": os.environ[name]} for name in PASSED_ON if name in os.environ]
    pod = {
        "serviceAccountName": account,
        "nodeSelector": dict(machines.node_selector),
        "tolerations": machines.tolerations,
        "securityContext": {
            "runAsUser": machines.user,
            "runAsGroup": machines.user,
            "runAsNonRoot": True,
        },
        "volumes": [
            {"name": "tmp", "emptyDir": {}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}},
        ],
        "containers": [
            {
                "name": NODE,
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "capabilities": {"drop": ["ALL"]},
                },
                "volumeMounts": [
                    {"name": "tmp", "mountPath": "/tmp"},
                    {"name": "shm", "mountPath": "/dev/shm"},
                ],
            }
        ],
    }
    replicated = {"name": NODE, "template": {"spec": {"template": {"spec": pod}}}}
    patch = {
        "manager": MANAGER,
        "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [replicated]}}},
    }
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "TrainJob",
        "metadata": {"name": name, **({"ownerReferences": [owner]} if owner else {})},
        "spec": {
            "runtimeRef": RUNTIME,
            "trainer": {
                "image": machines.image,
                "command": ["python", "-m", "model_lib", "train"],
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
    """Train a candidate on several machines; return the URI of its best model as `model`, and what
    is written in it.

    Raises:
        UserError: this is no cluster, or one without Kubeflow Trainer; another step trains the
            same; or the machines' program refuses its input.
        WorkError: the job failed, or could not be made or followed.
    """
    name = job_name(config, fingerprint)
    with _terminable(), kubernetes_errors():
        cluster = Cluster()
        with cluster.job(job_document(name, config, machines, cluster.account(), cluster.owner())):
            cluster.follow(name)
    best = storage.join(config.output, "best")
    return {"model": best, **storage.read_json(storage.join(best, "training.json"))}


def job_name(config: TrainConfig, fingerprint: str) -> str:
    """Return the name of a candidate's job, by which a second attempt finds what the first one
    left.

    It is one for each output: another run's candidate may have the same options and data.
    """
    return f"captioner-{config.key(fingerprint, config.output)}"


def require_trainer(candidates: Sequence[TrainConfig], machines: Machines) -> None:
    """Let Kubernetes check each candidate's TrainJob, as the step would send it, without making it.

    Raises:
        UserError: this is no cluster, or one without Kubeflow Trainer, our runtime or the right to
            use them.
        WorkError: Kubernetes or Kubeflow Trainer fails.
    """
    with kubernetes_errors():
        cluster = Cluster()
        cluster.require_trainer()
        account, owner = cluster.account(), cluster.owner()
    for config in candidates:
        cluster.rehearse(job_document("captioner-preflight", config, machines, account, owner))


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
