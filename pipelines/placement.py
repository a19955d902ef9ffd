"""Where a task runs on a cluster: resources, retries, time limit, user, secrets, GPU nodes.

`kfp.local` ignores all of it. Each key of a secret becomes an environment variable; a missing key
leaves it unset.
"""

from typing import Any

from kfp import dsl, kubernetes

from model_lib.tracking.server import FROM_SECRET

USER = 1000
"""The images' user and group."""
SECRET = "captioner"
"""Name of the Kubernetes secret, unless the run names another."""
MLFLOW = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_UI_URL",
)
BUCKET = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL")
"""For S3; on GKE, workload identity needs none."""
HUB = ("HF_TOKEN",)
WEBHOOK = ("WEBHOOK_URL",)
PREFLIGHT: dict[str, Any] = {"keys": (*BUCKET, *HUB, *WEBHOOK), "hours": 0.25, "retries": 1}
"""Placement of a pipeline's first step, with time to pull its image onto a new node."""

GPU_RESOURCE = "nvidia.com/gpu"
GPU_NODES = {"cloud.google.com/gke-accelerator": "nvidia-l4", "cloud.google.com/gke-spot": "true"}
GPU_TOLERATIONS = [
    {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
    {
        "key": "cloud.google.com/gke-spot",
        "operator": "Equal",
        "value": "true",
        "effect": "NoSchedule",
    },
]
"""GKE's labels and taints of a spot node pool with L4 GPUs."""


def place(
    task: dsl.PipelineTask,
    name: str,
    *,
    secret: Any,
    keys: tuple[str, ...] = (),
    cpu: int = 1,
    memory: int = 2,
    hours: float = 1,
    retries: int = 2,
    cached: bool = False,
) -> dsl.PipelineTask:
    """Give a task its display name, resources, retries, time limit, user and secrets.

    Args:
        task, name: the task, and its name in the UI.
        secret, keys: name of the Kubernetes secret, and which of its keys the task sees.
        cpu: cores requested; twice as many are the limit.
        memory: GiB, requested and limit.
        hours: after which the pod is stopped.
        retries: after a failure, a minute later, then two, then four, and so on.
        cached: whether the same inputs in the same image make a rerun skip the task.
    """
    task.set_display_name(name).set_caching_options(cached)
    task.set_cpu_request(str(cpu)).set_cpu_limit(str(2 * cpu))
    task.set_memory_request(f"{memory}Gi").set_memory_limit(f"{memory}Gi")
    if retries:
        # Argo counts this time from the first attempt's start, and takes whole factors only.
        longest = int(3600 * hours * (retries + 1)) + 60 * 2**retries
        task.set_retry(
            retries, backoff_duration="60s", backoff_factor=2.0, backoff_max_duration=f"{longest}s"
        )
    kubernetes.set_timeout(task, int(hours * 3600))
    kubernetes.set_image_pull_policy(task, "IfNotPresent")  # what make push pinned are digests
    kubernetes.set_security_context(task, run_as_user=USER, run_as_group=USER, run_as_non_root=True)
    kubernetes.empty_dir_mount(task, volume_name="tmp", mount_path="/tmp")
    # From the pod's labels: as parameters they would differ in each run, and nothing be cached.
    kubernetes.use_field_path_as_env(task, "KFP_RUN_ID", "metadata.labels['pipeline/runid']")
    kubernetes.use_field_path_as_env(
        task, "KFP_WORKFLOW", "metadata.labels['workflows.argoproj.io/workflow']"
    )
    kubernetes.use_secret_as_env(task, secret, variables(keys), optional=True)
    return task


def variables(keys: tuple[str, ...]) -> dict[str, str]:
    """Return the environment variable of each of MLflow's keys in the secret, and of `keys`."""
    return {key: FROM_SECRET + key if key in MLFLOW else key for key in (*MLFLOW, *keys)}


def on_gpu(
    task: dsl.PipelineTask,
    gpu_resource: Any,
    gpu_count: Any,
    gpu_node_selector: Any,
    gpu_tolerations: Any,
) -> None:
    """Put a task on a GPU node, with shared memory for data loading.

    Args:
        task: to be placed.
        gpu_resource: what the container asks for, "nvidia.com/gpu".
        gpu_count: how many, as text: Kubeflow Pipelines (2.17) takes a number here for none at all.
        gpu_node_selector: labels of the nodes.
        gpu_tolerations: of the nodes' taints.
    """
    # kfp (2.17) does not pass these two on into loops and conditions.
    task.register_pipeline_channels([gpu_resource, gpu_count])
    task.set_accelerator_type(gpu_resource).set_accelerator_limit(gpu_count)
    kubernetes.add_node_selector_json(task, gpu_node_selector)
    kubernetes.add_toleration_json(task, gpu_tolerations)
    kubernetes.empty_dir_mount(
        task, volume_name="shm", mount_path="/dev/shm", medium="Memory", size_limit="8Gi"
    )
