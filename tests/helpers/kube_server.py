"""A server on loopback that stands for a Kubernetes cluster with Kubeflow Trainer: TrainJobs, their
pods and logs.

A TrainJob is checked by the rules in `kube_rules.py`, and then really runs: each of its machines is
a process here, with the variables that Trainer's torch plugin gives.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from tests.helpers.kube_rules import (
    API,
    EVENTS,
    JOBS,
    JOBSETS,
    POD,
    PODS,
    VERBS,
    WEBHOOK,
    Refused,
    allowed,
    checked,
)

COLLECTED = 0.5
"""Seconds after which Kubernetes' garbage collector removes what belonged to an object that was
deleted."""


class Machine:
    """One pod of a job: a process, its log, and how Kubernetes sees it.

    Args:
        job: name of the JobSet.
        jobset: its uid.
        index: of the machine.
        command: of its process; None if it cannot start.
        environment: of its process.
        folder: for its log.
    """

    def __init__(
        self,
        job: str,
        jobset: str,
        index: int,
        command: list[str] | None,
        environment: Mapping[str, str],
        folder: Path,
    ) -> None:
        self.name, self.job, self.jobset, self.index = (
            f"{job}-node-0-{index}-{jobset[:5]}",
            job,
            jobset,
            index,
        )
        self.log = folder / f"{self.name}.log"
        self.log.touch()
        self.stamps: list[datetime] = []
        """When each line was first seen."""
        self.waiting: dict[str, str] | None = None
        """Reason and message of a container that does not start."""
        self.unscheduled: str | None = None
        """Why no node takes it."""
        self.reason: str | None = None
        """The container's reason in place of Error."""
        self.message: str | None = None
        self.pod_reason: tuple[str, str] | None = None
        """Why the pod as a whole ended, and what is said of it."""
        self.process: subprocess.Popen | None = None
        self.killer: threading.Timer | None = None
        if command is None:
            return

        def as_first_process() -> None:
            os.setsid()
            if not POD.get(
                "shareProcessNamespace"
            ):  # process 1 gets no signal that it has not asked for
                signal.signal(signal.SIGTERM, signal.SIG_IGN)

        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                env=dict(environment),
                cwd=Path(__file__).parents[1],
                stdout=log,
                stderr=log,
                preexec_fn=as_first_process,
            )

    @property
    def phase(self) -> str:
        if self.process is None:
            return "Pending"
        code = self.process.poll()
        return "Running" if code is None else "Failed" if code else "Succeeded"

    def lines(self) -> list[tuple[datetime, str]]:
        text = self.log.read_bytes().decode(errors="surrogateescape").removesuffix("\n")
        lines = text.split("\n") if text else []
        now, new = datetime.now(UTC), range(len(lines) - len(self.stamps))
        self.stamps += [now + timedelta(microseconds=number) for number in new]
        return list(zip(self.stamps, lines, strict=False))

    def document(self) -> dict[str, Any]:
        labels = {
            "jobset.sigs.k8s.io/jobset-name": self.job,
            "jobset.sigs.k8s.io/jobset-uid": self.jobset,
            "jobset.sigs.k8s.io/replicatedjob-name": "node",
            "batch.kubernetes.io/job-completion-index": str(self.index),
        }
        state: dict[str, Any] = {"running": {}}
        conditions: list[dict[str, str]] = []
        if self.waiting is not None:
            state = {"waiting": self.waiting}
        elif self.unscheduled is not None:
            conditions = [
                {
                    "type": "PodScheduled",
                    "status": "False",
                    "reason": "Unschedulable",
                    "message": self.unscheduled,
                }
            ]
        elif self.phase in ("Failed", "Succeeded"):
            code = self.process.returncode if self.process else 0
            ended = {
                "exitCode": code if code >= 0 else 128 - code,
                "reason": self.reason or "Error",
            }
            state = {"terminated": {**ended, **({"message": self.message} if self.message else {})}}
        statuses = (
            []
            if self.unscheduled
            else [{"name": "node", "state": state, "ready": False, "restartCount": 0}]
        )
        for status in statuses:
            status.update(image="x", imageID="x")
        whole = (
            dict(zip(("reason", "message"), self.pod_reason, strict=True))
            if self.pod_reason
            else {}
        )
        return {
            "metadata": {
                "name": self.name,
                "labels": labels,
                "creationTimestamp": "2026-11-23T12:00:00Z",
            },
            "spec": {
                "containers": [{"name": "node"}],
                "terminationGracePeriodSeconds": POD["terminationGracePeriodSeconds"],
            },
            "status": {
                "phase": self.phase,
                "containerStatuses": statuses,
                "conditions": conditions,
                **whole,
            },
        }

    def stop(self) -> None:
        """Let it end as a pod that is deleted: SIGTERM to its program, SIGKILL after its grace."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        self.killer = threading.Timer(POD["terminationGracePeriodSeconds"], self.kill)
        self.killer.daemon = True
        self.killer.start()

    def is_gone(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def kill(self) -> None:
        if self.killer is not None:
            self.killer.cancel()
        if self.process is not None and self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class KubeServer:
    """Runs in a thread on a free port.

    Args:
        folder: for logs and the kubeconfig.
        trainer: whether Kubeflow Trainer is installed.
        variables: that a secret and the cluster's DNS would give to the machines.
        program: Python that the machines run instead of the job's own command, if any.
        starts: whether the machines' containers start; else the test says what they wait for.
        makes_pods: whether pods are made at all.
    """

    def __init__(
        self,
        folder: Path,
        trainer: bool = True,
        variables: dict[str, str] | None = None,
        program: str | None = None,
        starts: bool = True,
        makes_pods: bool = True,
    ) -> None:
        self.folder, self.trainer, self.variables = folder, trainer, variables or {}
        self.program, self.starts, self.makes_pods = program, starts, makes_pods
        self.jobs: dict[str, dict[str, Any]] = {}
        self.jobsets: dict[str, dict[str, Any]] = {}
        self.machines: dict[str, list[Machine]] = {}
        self.created: list[dict[str, Any]] = []
        self.rehearsed: list[dict[str, Any]] = []
        self.beside: list[str] = []
        """Machines of an earlier job that were there when another of its name was made."""
        self.stopped: set[str] = set()
        """Machines that were told to end."""
        self.garbage: dict[str, float] = {}
        """When the JobSet of a job that was deleted is collected."""
        self.events: list[tuple[str, str, str]] = []
        """Warnings: the object's name, the reason and the message."""
        self.calls: list[str] = []
        self.steps = {"step": ("1234", "Running")}
        """The pods of a pipeline's steps: their uid and phase."""
        self.forbidden = False
        """Whether the steps' account may not make TrainJobs."""
        self.webhook_away = False
        self.failing = 0
        """So many of the next requests are answered 503."""
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        address = f"http://127.0.0.1:{self.server.server_port}"
        named = {"name": "here"}
        config = {"apiVersion": "v1", "kind": "Config", "current-context": "here"}
        config |= {
            "clusters": [{**named, "cluster": {"server": address}}],
            "users": [{**named, "user": {}}],
        }
        config |= {
            "contexts": [
                {**named, "context": {"cluster": "here", "user": "here", "namespace": "kubeflow"}}
            ]
        }
        self.kubeconfig = folder / "kubeconfig"
        self.kubeconfig.write_text(yaml.safe_dump(config))

    def __enter__(self) -> "KubeServer":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for machines in self.machines.values():
            for machine in machines:
                machine.kill()
        self.server.shutdown()
        self.server.server_close()

    def route(self, method: str, path: str, query: dict[str, str], body: bytes) -> dict[str, Any]:
        """Return the answer to a request."""
        if self.failing:
            self.failing -= 1
            raise Refused(503, "the server is currently unable to handle the request")
        if not allowed(method, path) or (self.forbidden and method == "POST"):
            user = "system:serviceaccount:kubeflow:pipeline-runner"
            raise Refused(
                403, f'{path.split("/")[6]} is forbidden: User "{user}" cannot {VERBS[method]} it'
            )
        if path in (API, f"{API}/"):
            if not self.trainer:
                raise Refused(404, "the server could not find the requested resource")
            return {
                "kind": "APIResourceList",
                "groupVersion": "trainer.kubeflow.org/v1alpha1",
                "resources": [],
            }
        if path == JOBS and method == "POST":
            if self.webhook_away:
                raise Refused(
                    500,
                    f'Internal error occurred: failed calling webhook "{WEBHOOK}": no endpoints '
                    "available",
                )
            document = checked(json.loads(body))
            if query.get("dryRun") == "All":
                self.rehearsed.append(document)
                return document
            return self._create(document)
        name = path.rpartition("/")[2]
        if path.startswith(f"{JOBS}/"):
            if name not in self.jobs:
                raise Refused(404, f'trainjobs.trainer.kubeflow.org "{name}" not found')
            if method == "DELETE":
                options = json.loads(body or b"{}")
                self.delete(
                    name,
                    query.get("propagationPolicy")
                    or options.get("propagationPolicy", "Background"),
                )
                return {"kind": "Status", "status": "Success"}
            return {**self.jobs[name], "status": {"conditions": self._conditions(name)}}
        if path.startswith(f"{JOBSETS}/"):
            self._collect()
            if name not in self.jobsets:
                raise Refused(404, f'jobsets.jobset.x-k8s.io "{name}" not found')
            return self.jobsets[name]
        if path == EVENTS:
            events = [
                {
                    "metadata": {"name": "e"},
                    "involvedObject": {"name": name},
                    "reason": reason,
                    "message": message,
                }
                for name, reason, message in self.events
            ]
            return {"kind": "EventList", "apiVersion": "v1", "items": events}
        if path == PODS:
            wanted = dict(pair.split("=") for pair in query["labelSelector"].split(","))
            self._collect()
            pods = [
                machine.document() for machines in self.machines.values() for machine in machines
            ]
            found = [pod for pod in pods if wanted.items() <= pod["metadata"]["labels"].items()]
            return {"kind": "PodList", "apiVersion": "v1", "items": found}
        if path.startswith(f"{PODS}/"):
            if name not in self.steps:
                raise Refused(404, f'pods "{name}" not found')
            uid, phase = self.steps[name]
            spec = {"serviceAccountName": "pipeline-runner", "containers": []}
            return {
                "metadata": {"name": name, "uid": uid},
                "spec": spec,
                "status": {"phase": phase},
            }
        raise Refused(404, f"{path} not found")

    def _create(self, document: dict[str, Any]) -> dict[str, Any]:
        name = document["metadata"]["name"]
        if name in self.jobs:
            raise Refused(409, f'trainjobs.trainer.kubeflow.org "{name}" already exists')
        self._collect()
        self.beside += [machine.name for machine in self.machines.get(name, [])]
        self.created.append(document)
        self.jobs[name] = {
            **document,
            "metadata": {**document["metadata"], "uid": str(uuid.uuid4())},
        }
        self._make_jobset(name)
        return self.jobs[name]

    def _make_jobset(self, name: str) -> None:
        """Make a TrainJob's JobSet and its pods, as Kubeflow Trainer and JobSet do, unless one of
        its name is there."""
        if name in self.jobsets:
            return
        owner = {"kind": "TrainJob", "name": name, "uid": self.jobs[name]["metadata"]["uid"]}
        uid = str(uuid.uuid4())
        self.jobsets[name] = {"metadata": {"name": name, "uid": uid, "ownerReferences": [owner]}}
        if not self.makes_pods:
            self.machines.setdefault(name, [])
            return
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        trainer = self.jobs[name]["spec"]["trainer"]
        for index in range(trainer["numNodes"]):
            places = {
                "PET_NNODES": trainer["numNodes"],
                "PET_NPROC_PER_NODE": trainer["numProcPerNode"],
            }
            places |= {
                "PET_NODE_RANK": index,
                "PET_MASTER_ADDR": "127.0.0.1",
                "PET_MASTER_PORT": port,
            }
            given = {
                variable["name"]: variable["value"]
                for variable in trainer.get("env", [])
                if "value" in variable
            }
            environment = {
                **os.environ,
                **{k: str(v) for k, v in places.items()},
                **given,
                **self.variables,
            }
            command = [*trainer["command"], *trainer["args"]]
            assert command[0] == "python"
            command = [sys.executable, *(["-c", self.program] if self.program else command[1:])]
            environment |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
            machine = Machine(
                name, uid, index, command if self.starts else None, environment, self.folder
            )
            self.machines.setdefault(name, []).append(machine)

    def delete(self, name: str, propagation: str) -> None:
        for machine in self.machines.get(name, []):
            machine.stop()
        self.stopped |= {machine.name for machine in self.machines.get(name, [])}
        if (
            propagation == "Foreground"
        ):  # while it waits for its dependents, Trainer goes on to reconcile it
            self.jobs[name]["metadata"]["deletionTimestamp"] = "2026-11-23T12:00:00Z"
            del self.jobsets[name]
            self._make_jobset(name)
        else:
            del self.jobs[name]
            self.garbage[name] = time.monotonic() + COLLECTED

    def _collect(self) -> None:
        """Forget the JobSets and pods that were deleted and have ended."""
        for name, moment in list(self.garbage.items()):
            if time.monotonic() > moment:
                self.jobsets.pop(name, None)
                del self.garbage[name]
        for name, machines in self.machines.items():
            self.machines[name] = [
                m for m in machines if m.name not in self.stopped or not m.is_gone()
            ]

    def _conditions(self, name: str) -> list[dict[str, Any]]:
        """Return a TrainJob's conditions: those of the JobSet of its name, even if it is of an
        earlier job."""
        jobset = self.jobsets.get(name, {"metadata": {"uid": None}})
        phases = {
            machine.phase
            for machine in self.machines[name]
            if machine.jobset == jobset["metadata"]["uid"]
        }
        end = "Failed" if "Failed" in phases else "Complete" if phases == {"Succeeded"} else None
        end = jobset.setdefault("end", None) or end
        jobset["end"] = end
        message = (
            "jobset failed due to one or more job failures"
            if end == "Failed"
            else "jobset completed"
        )
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
                    with contextlib.suppress(BrokenPipeError):
                        self.send_log(url.path.split("/")[-2], query)
                    return
                try:
                    status, document = 200, server.route(self.command, url.path, query, body)
                except Refused as refused:
                    status = refused.status
                    document = {
                        "kind": "Status",
                        "status": "Failure",
                        "message": str(refused),
                        "code": status,
                    }
                content = json.dumps(document).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_DELETE = answer

            def send_log(self, pod: str, query: dict[str, str]) -> None:
                (machine,) = (
                    m for machines in server.machines.values() for m in machines if m.name == pod
                )
                self.send_response(200)
                self.end_headers()
                since = datetime.now(UTC) - timedelta(seconds=int(query.get("sinceSeconds", 10**6)))
                lines = [(stamp, line) for stamp, line in machine.lines() if stamp >= since]
                for stamp, line in lines[-int(query.get("tailLines", 10**6)) :]:
                    shown = (
                        f"{stamp:%Y-%m-%dT%H:%M:%S.%f}".rstrip("0") + f"Z {line}"
                    )  # as Go's RFC3339Nano
                    text = shown if query.get("timestamps", "").lower() == "true" else line
                    self.wfile.write(f"{text}\n".encode(errors="surrogateescape"))

            def log_message(self, *_: object) -> None:
                pass

        return Handler
