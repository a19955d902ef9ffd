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
    """The machines of a job, as the pipeline's parameters describe them."""

    nodes: int
    image: str
    cpu: int
    """Cores requested; the limit is twice as many."""
    memory: int
    """GiB."""
    gpu_resource: str
    gpu_count: str
    """GPUs of each machine, a whole number as text."""
    gpu_node_selector: Mapping[str, str]
    gpu_tolerations: Sequence[Mapping[str, Any]]
    secret_name: str
    secret_variables: Mapping[str, str]
    """The environment variable for each key of the secret."""

    def __post_init__(self) -> None:
        is_number = self.gpu_count.isdecimal()
        require(is_number, f"gpu_count {self.gpu_count!r}: is not a whole number, as text")


def job_document(
    name: str,
    config: TrainConfig,
    machines: Machines,
    account: str,
    owners: Sequence[Mapping[str, str]] = (),
) -> dict[str, Any]:
    """Return the TrainJob that trains a candidate, as Kubernetes takes it.

    Its machines run under the service account `account`; Kubernetes deletes it together with the
    pods to which `owners` refer.
    """
    gpus = int(machines.gpu_count)
    resources = {"memory": f"{machines.memory}Gi"}
    if gpus:
        resources[machines.gpu_resource] = machines.gpu_count
    variables: list[dict[str, Any]] = [
        {"name": key, "value": os.environ[key]}
        for key in PASSED_ON
        # A step that adopted its secret's variables has them under these names as well.
        if key in os.environ and os.environ[key] != os.environ.get(FROM_SECRET + key)
    ]
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
        "metadata": {"name": name, "ownerReferences": list(owners)},
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
    """Return the name of a candidate's job, the same in each attempt with the same output."""
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
        document = job_document(name, config, machines, cluster.account, cluster.owners)
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
        cluster.dry_run(job_document(name, config, machines, cluster.account, cluster.owners))
