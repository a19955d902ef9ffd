"""A server on loopback that stands for a Kubernetes cluster with Kubeflow Trainer: TrainJobs, their pods and logs.

A TrainJob is checked against the models of Kubeflow Trainer's own API, and then really runs: each of its machines is a
process here, with the variables that Trainer's torch plugin gives to torchrun.
"""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml
from kubeflow_trainer_api import models

DEPLOYED = yaml.safe_load_all((Path(__file__).parents[1] / "deploy" / "trainer.yaml").read_text())
RUNTIME = next(document for document in DEPLOYED if document["kind"] == "TrainingRuntime")
JOBS = "/apis/trainer.kubeflow.org/v1alpha1"
RESERVED = {"PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT"}


class Refused(Exception):
    """An HTTP status with the server's message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def checked(document: dict[str, Any]) -> dict[str, Any]:
    """Return a TrainJob as the API server takes it; `Refused` for unknown fields and wrong types."""
    try:
        known = models.TrainerV1alpha1TrainJob.from_dict(document).to_dict()
    except ValueError as error:
        raise Refused(422, str(error)) from error
    if known != document:
        raise Refused(400, f"unknown fields: {document} is not {known}")
    trainer = document["spec"]["trainer"]
    if RESERVED & {variable["name"] for variable in trainer.get("env", [])}:
        raise Refused(422, "must not have reserved envs")
    runtime = {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": RUNTIME["metadata"]["name"]}
    if document["spec"]["runtimeRef"] != runtime:
        raise Refused(422, "the runtime is not there")
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", document["metadata"]["name"]):
        raise Refused(422, "metadata.name: is not a DNS label")
    return document


class Machine:
    """One pod of a job: a process, its log, and how Kubernetes sees it."""

    def __init__(self, job: str, index: int, trainer: dict[str, Any], port: int, folder: Path, extra: dict) -> None:
        self.name, self.job, self.index = f"{job}-node-0-{index}-x", job, index
        self.log = folder / f"{self.name}.log"
        self.stamps: list[str] = []
        """When each line was first seen."""
        nodes, processes = trainer["numNodes"], trainer["numProcPerNode"]
        places = {"PET_NNODES": nodes, "PET_NPROC_PER_NODE": processes, "PET_NODE_RANK": index}
        places |= {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": port}
        given = {variable["name"]: variable["value"] for variable in trainer.get("env", []) if "value" in variable}
        command = [*trainer["command"], *trainer["args"]]
        assert command[0] == "python"
        environment = {**os.environ, **{k: str(v) for k, v in places.items()}, **given, **extra, "OMP_NUM_THREADS": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *command[1:]],
                env=environment,
                cwd=Path(__file__).parents[1],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def phase(self) -> str:
        code = self.process.poll()
        return "Running" if code is None else "Failed" if code else "Succeeded"

    def document(self) -> dict[str, Any]:
        labels = {
            "jobset.sigs.k8s.io/jobset-name": self.job,
            "jobset.sigs.k8s.io/replicatedjob-name": "node",
            "batch.kubernetes.io/job-completion-index": str(self.index),
        }
        return {
            "metadata": {"name": self.name, "labels": labels, "creationTimestamp": "2026-11-23T12:00:00Z"},
            "spec": {"containers": [{"name": "node"}]},
            "status": {"phase": self.phase},
        }

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, 9)
        self.process.wait()


class KubeServer:
    """Runs in a thread on a free port.

    Args:
        folder: for logs and the kubeconfig.
        trainer: whether Kubeflow Trainer is installed.
        variables: that a secret and the cluster's DNS would give to the machines.
    """

    def __init__(self, folder: Path, trainer: bool = True, variables: dict[str, str] | None = None) -> None:
        self.folder, self.trainer, self.variables = folder, trainer, variables or {}
        self.jobs: dict[str, dict[str, Any]] = {}
        self.machines: dict[str, list[Machine]] = {}
        self.created: list[dict[str, Any]] = []
        self.calls: list[str] = []
        self.steps = {"step": ("1234", "Running")}
        """The pods of a pipeline's steps: their uid and phase."""
        self.forbidden = False
        """Whether the steps' account may not make TrainJobs."""
        self.failing = 0
        """So many of the next requests are answered 503."""
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        address = f"http://127.0.0.1:{self.server.server_port}"
        named = {"name": "here"}
        config = {"apiVersion": "v1", "kind": "Config", "current-context": "here"}
        config |= {"clusters": [{**named, "cluster": {"server": address}}], "users": [{**named, "user": {}}]}
        config |= {"contexts": [{**named, "context": {"cluster": "here", "user": "here", "namespace": "kubeflow"}}]}
        self.kubeconfig = folder / "kubeconfig"
        self.kubeconfig.write_text(yaml.safe_dump(config))

    def __enter__(self) -> "KubeServer":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for machines in self.machines.values():
            for machine in machines:
                machine.end()
        self.server.shutdown()
        self.server.server_close()

    def route(self, method: str, path: str, query: dict[str, str], body: bytes) -> dict[str, Any]:
        if self.failing:
            self.failing -= 1
            raise Refused(503, "the server is currently unable to handle the request")
        if path.startswith(JOBS) and not self.trainer:
            raise Refused(404, "the server could not find the requested resource")
        if path in (JOBS, f"{JOBS}/"):
            return {"kind": "APIResourceList", "groupVersion": "trainer.kubeflow.org/v1alpha1", "resources": []}
        jobs = f"{JOBS}/namespaces/kubeflow/trainjobs"
        if (method, path) == ("POST", jobs):
            if self.forbidden:
                raise Refused(403, "trainjobs.trainer.kubeflow.org is forbidden")
            document = checked(json.loads(body))
            return document if query.get("dryRun") == "All" else self._create(document)
        if path.startswith(f"{jobs}/"):
            name = path.removeprefix(f"{jobs}/")
            if name not in self.jobs:
                raise Refused(404, f'trainjobs.trainer.kubeflow.org "{name}" not found')
            if method == "DELETE":
                for machine in self.machines.pop(name):
                    machine.end()
                return self.jobs.pop(name)
            return {**self.jobs[name], "status": {"conditions": self._conditions(name)}}
        if path == "/api/v1/namespaces/kubeflow/pods":
            wanted = dict(pair.split("=") for pair in query["labelSelector"].split(","))
            machines = self.machines.get(wanted["jobset.sigs.k8s.io/jobset-name"], [])
            return {"kind": "PodList", "apiVersion": "v1", "items": [machine.document() for machine in machines]}
        if path.startswith("/api/v1/namespaces/kubeflow/pods/"):
            name = path.rpartition("/")[2]
            if name not in self.steps:
                raise Refused(404, f'pods "{name}" not found')
            uid, phase = self.steps[name]
            spec = {"serviceAccountName": "pipeline-runner", "containers": []}
            return {"metadata": {"name": name, "uid": uid}, "spec": spec, "status": {"phase": phase}}
        raise Refused(404, f"{path} not found")

    def _create(self, document: dict[str, Any]) -> dict[str, Any]:
        name, trainer = document["metadata"]["name"], document["spec"]["trainer"]
        if name in self.jobs:
            raise Refused(409, f'trainjobs.trainer.kubeflow.org "{name}" already exists')
        self.jobs[name] = document
        self.created.append(document)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        nodes = range(trainer["numNodes"])
        self.machines[name] = [Machine(name, node, trainer, port, self.folder, self.variables) for node in nodes]
        return document

    def _conditions(self, name: str) -> list[dict[str, Any]]:
        phases = {machine.phase for machine in self.machines[name]}
        end = "Failed" if "Failed" in phases else "Complete" if phases == {"Succeeded"} else None
        message = "jobset failed due to one or more job failures" if end == "Failed" else "jobset completed"
        return [{"type": end, "status": "True", "reason": "r", "message": message}] if end else []

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                url = urlsplit(self.path)
                query = {name: values[0] for name, values in parse_qs(url.query).items()}
                server.calls.append(f"{self.command} {url.path}")
                if url.path.endswith("/log"):
                    self.send_log(url.path.split("/")[-2], query)
                    return
                try:
                    status, document = 200, server.route(self.command, url.path, query, body)
                except Refused as refused:
                    status = refused.status
                    document = {"kind": "Status", "status": "Failure", "message": str(refused), "code": status}
                content = json.dumps(document).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_DELETE = answer

            def send_log(self, pod: str, query: dict[str, str]) -> None:
                (machine,) = (m for machines in server.machines.values() for m in machines if m.name == pod)
                self.send_response(200)
                self.end_headers()
                if "tailLines" in query:
                    self.wfile.write(
                        "\n".join(machine.log.read_text().splitlines()[-int(query["tailLines"]) :]).encode()
                    )
                    return
                sent = 0
                while True:
                    over = machine.phase != "Running"
                    lines = machine.log.read_text().splitlines()
                    machine.stamps += [datetime.now(UTC).isoformat() for _ in lines[len(machine.stamps) :]]
                    for stamp, line in list(zip(machine.stamps, lines, strict=False))[sent:]:
                        self.wfile.write(f"{stamp} {line}\n".encode())
                    sent = len(lines)
                    if over:
                        return
                    time.sleep(0.1)

            def log_message(self, *_: object) -> None:
                pass

        return Handler
