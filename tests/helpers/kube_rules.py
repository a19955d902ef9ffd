"""What Kubernetes, the schema and webhook of Kubeflow Trainer 2.3.0, and the rights of the steps'
account refuse.

Read in Trainer's `pkg/apis/trainer/v1alpha1`, `pkg/runtime/framework/plugins/torch` and `…/jobset`.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from kubeflow_trainer_api import models

from tests.helpers.http_server import Refused

MANIFEST = Path(__file__).parents[2] / "deploy" / "trainer.yaml"
DEPLOYED = {document["kind"]: document for document in yaml.safe_load_all(MANIFEST.read_text())}
RUNTIME = DEPLOYED["TrainingRuntime"]
TEMPLATES = {
    job["name"]: job["template"]["spec"]["template"]["spec"]
    for job in RUNTIME["spec"]["template"]["spec"]["replicatedJobs"]
}
POD = TEMPLATES["node"]
JOBS = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/kubeflow/trainjobs"
JOBSETS = "/apis/jobset.x-k8s.io/v1alpha2/namespaces/kubeflow/jobsets"
PODS = "/api/v1/namespaces/kubeflow/pods"
EVENTS = "/api/v1/namespaces/kubeflow/events"
RESERVED = {"PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK"}
RESERVED |= {"PET_MASTER_ADDR", "PET_MASTER_PORT"}
SUBDOMAIN = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
PATH = r"[A-Za-z0-9/\-._~%!$&'()*+,;=:]+"
WEBHOOK = "validator.trainjob.trainer.kubeflow.org"
DENIED = f'admission webhook "{WEBHOOK}" denied the request'
VERBS = {"GET": {"get", "list"}, "POST": {"create"}, "DELETE": {"delete"}}


def checked(document: dict[str, Any]) -> dict[str, Any]:
    """Return a TrainJob; `Refused` for what the API server, its schema or the webhook refuse."""
    try:
        known = models.TrainerV1alpha1TrainJob.from_dict(document).to_dict()
    except ValueError as error:
        raise Refused(422, str(error)) from error
    if known != document:
        raise Refused(400, f"unknown fields: {document} is not {known}")
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", document["metadata"]["name"]):
        raise Refused(422, "metadata.name must match RFC 1035 DNS label format")
    name = RUNTIME["metadata"]["name"]
    runtime = {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": name}
    if document["spec"]["runtimeRef"] != runtime:
        raise Refused(403, f"{DENIED}: the runtime does not exist")
    problems = list(denied(document["spec"]))
    if problems:
        raise Refused(403, f"{DENIED}: {'; '.join(problems)}")
    return document


def denied(spec: dict[str, Any]) -> Iterator[str]:
    """Yield what Trainer's webhook has against a TrainJob: its `torch.go` and `jobset.go`."""
    if RESERVED & {variable["name"] for variable in spec["trainer"].get("env", [])}:
        yield "spec.trainer.env: must not have reserved envs"
    for patch in spec.get("runtimePatches", []):
        host, slash, path = patch["manager"].partition("/")
        if not slash or not re.fullmatch(SUBDOMAIN, host) or not re.fullmatch(PATH, path):
            value = f'spec.runtimePatches.manager: Invalid value: "{patch["manager"]}"'
            yield f'{value}: must be a domain-prefixed path (such as "acme.io/foo")'
        for job in patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]:
            if job["name"] not in TEMPLATES:
                yield "must not have replicated job that doesn't exist in the runtime job template"
                continue
            known = {container["name"] for container in TEMPLATES[job["name"]]["containers"]}
            for container in job["template"]["spec"]["template"]["spec"].get("containers", []):
                if container["name"] not in known:
                    yield f"must not have container that doesn't exist in job {job['name']}"
                if container.get("env"):
                    yield "must not have envs for the node container"


def allowed(method: str, path: str) -> bool:
    """Return whether the steps' account may make a request: by our role, or by KFP's own for pods
    and their logs."""
    parts = path.split("/")
    group, resource = ("", parts[5]) if path.startswith("/api/v1/") else (parts[2], parts[6])
    if (group, resource) == ("", "pods"):
        return True
    return any(
        group in rule["apiGroups"]
        and resource in rule["resources"]
        and VERBS[method] & set(rule["verbs"])
        for rule in DEPLOYED["Role"]["rules"]
    )
