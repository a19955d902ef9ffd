"""Training on several machines of a cluster: the step's side of a TrainJob of Kubeflow Trainer.

The job's machines run `captioner train` and resume from the candidate's checkpoints like any other
run. The names are those of Kubeflow Trainer 2.3.
"""

import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model_lib.exits import catch_signals
from model_lib.io import storage
from model_lib.options import as_arguments, require
from model_lib.tracking.server import FROM_SECRET
from model_lib.train.config import TrainConfig
from model_lib.train.job_view import follow
from model_lib.train.kubernetes import GROUP, NODE, VERSION, Cluster

RUNTIME = {"apiGroup": GROUP, "kind": "TrainingRuntime", "name": "captioner"}
"""The training runtime in `deploy/trainer.yaml`. Kubeflow Trainer's own starts a failed machine
again and again."""
MANAGER = "captioner.example/train"
"""Manager of our patch of the runtime; Kubeflow Trainer's webhook requires a domain and a path."""
PASSED_ON = (
    "KFP_RUN_ID",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_EXPERIMENT_ID",
    "MLFLOW_EXPERIMENT_NAME",
    "MLFLOW_RUN_ID",
)
"""Variables of the step that its machines need too, unless they have them from the secret."""


@dataclass(frozen=True, kw_only=True)
class Machines:
    """Where and with what the machines of a job run, as the pipeline's parameters say it.

    Args:
        nodes: number of machines.
        image: of the container.
        cpu: cores requested.
        memory: GiB, requested and limit.
        gpu_resource: "nvidia.com/gpu", for example.
        gpu_count: GPUs of each machine, as text.
        gpu_node_selector: labels of the nodes.
        gpu_tolerations: of the nodes' taints.
        secret_name: the Kubernetes secret …
        secret_variables: … and the variable that each of its keys becomes.
    """

    nodes: int
    image: str
    cpu: int
    memory: int
    gpu_resource: str
    gpu_count: str
    gpu_node_selector: Mapping[str, str]
    gpu_tolerations: Sequence[Mapping[str, Any]]
    secret_name: str
    secret_variables: Mapping[str, str]

    def __post_init__(self) -> None:
        is_number = self.gpu_count.isdecimal()
        require(is_number, f"gpu_count {self.gpu_count!r}: is not a whole number, as text")


def job_document(
    name: str,
    config: TrainConfig,
    machines: Machines,
    account: str,
    owner: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return the TrainJob that trains a candidate, as Kubernetes takes it.

    Args:
        name: of the job.
        config: of the candidate.
        machines: on which it is trained.
        account: their Kubernetes service account.
        owner: reference to the pod with which Kubernetes deletes the job.
    """
    gpus = int(machines.gpu_count)
    resources = {"memory": f"{machines.memory}Gi"}
    if gpus:
        resources[machines.gpu_resource] = str(gpus)
    variables: list[dict[str, Any]] = []
    for key in PASSED_ON:
        value = os.environ.get(key)
        # A step that adopted its secret's variables has them under these names as well.
        if value is not None and value != os.environ.get(FROM_SECRET + key):
            variables.append({"name": key, "value": value})
    for key, variable in machines.secret_variables.items():
        reference = {"name": machines.secret_name, "key": key, "optional": True}
        variables.append({"name": variable, "valueFrom": {"secretKeyRef": reference}})
    pod = {
        "serviceAccountName": account,
        "nodeSelector": dict(machines.gpu_node_selector),
        "tolerations": list(machines.gpu_tolerations),
    }
    replicated_job = {"name": NODE, "template": {"spec": {"template": {"spec": pod}}}}
    runtime_spec = {"template": {"spec": {"replicatedJobs": [replicated_job]}}}
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
                "env": variables,
                "numNodes": machines.nodes,
                "numProcPerNode": config.processes or gpus or 1,
                "resourcesPerNode": {
                    "requests": {"cpu": str(machines.cpu), **resources},
                    "limits": {"cpu": str(2 * machines.cpu), **resources},
                },
            },
            "runtimePatches": [{"manager": MANAGER, "trainingRuntimeSpec": runtime_spec}],
        },
    }


def job_name(config: TrainConfig, fingerprint: str) -> str:
    """Return the name of a candidate's job: the same in a second attempt, another for another
    output."""
    return f"captioner-{config.key(fingerprint, config.output)}"


def train_on(machines: Machines, config: TrainConfig, fingerprint: str) -> dict[str, Any]:
    """Train a candidate on several machines; return its best model's URI and training record.

    Raises:
        UserError: there is no cluster, or no Kubeflow Trainer in it; or the input is refused.
        WorkError: the job failed, could not be created or followed, or another step trains the
            same candidate.
    """
    name = job_name(config, fingerprint)
    with catch_signals(signal.SIGTERM):  # so that the job is deleted
        cluster = Cluster()
        document = job_document(name, config, machines, cluster.account, cluster.owner)
        with cluster.job(document):
            follow(cluster, name)
    best = storage.join(config.output, "best")
    return {"model": best, **storage.read_json(storage.join(best, "training.json"))}


def require_trainer(candidates: Sequence[TrainConfig], machines: Machines) -> None:
    """Let Kubernetes check each candidate's TrainJob, as the step would send it.

    Raises:
        UserError: there is no cluster, or no Kubeflow Trainer, runtime or right to use them.
        WorkError: Kubernetes or Kubeflow Trainer fails.
    """
    cluster = Cluster()
    for config in candidates:
        name = "captioner-preflight"
        cluster.dry_run(job_document(name, config, machines, cluster.account, cluster.owner))
