"""A server on loopback that stands for a Kubernetes cluster with Kubeflow Trainer: TrainJobs, their
pods and logs.

A TrainJob is checked by the rules in `kube_rules.py`, and then really runs: each of its machines is
a process here, with the variables that Trainer's torch plugin sets.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from tests.helpers.http_server import ApiServer, Handler, Refused
from tests.helpers.kube_rules import (
    EVENTS,
    JOBS,
    JOBSETS,
    POD,
    PODS,
    VERBS,
    WEBHOOK,
    allowed,
    checked,
)
from tests.helpers.warm_python import warm_python

GRACE = POD["terminationGracePeriodSeconds"]
COLLECTED = 0.5
"""Seconds until Kubernetes removes what belonged to a deleted object."""
JOBSET = "jobset.sigs.k8s.io"


class Machine:
    """One pod of a job: a process, its log, and how Kubernetes sees it.

    Args:
        job: name of the JobSet.
        jobset: its uid.
        index: of the machine.
        command: of its process; None if it does not start.
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
        self.name, self.jobset = f"{job}-node-0-{index}-{jobset[:5]}", jobset
        self.labels = {
            f"{JOBSET}/jobset-name": job,
            f"{JOBSET}/jobset-uid": jobset,
            f"{JOBSET}/replicatedjob-name": "node",
            "batch.kubernetes.io/job-completion-index": str(index),
        }
        self.log = folder / f"{self.name}.log"
        self.log.touch()
        self.stamps: list[datetime] = []
        """When each line was first seen."""
        self.waiting: dict[str, str] | None = None
        """Reason and message of a container that does not start."""
        self.unscheduled: str | None = None
        """Why no node takes the pod."""
        self.terminated: dict[str, str] = {}
        """Reason and message of a container that has ended."""
        self.pod_end: dict[str, str] = {}
        """Reason and message of a pod that has ended."""
        self.process: subprocess.Popen | None = None
        self.killer: threading.Timer | None = None
        if command is None:
            return

        def as_first_process() -> None:
            os.setsid()
            if not POD.get("shareProcessNamespace"):  # process 1 gets only signals that it handles
                signal.signal(signal.SIGTERM, signal.SIG_IGN)

        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                env=dict(environment),
                cwd=Path(__file__).parents[2],
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
        state: dict[str, Any] = {"running": {}}
        if self.waiting is not None:
            state = {"waiting": self.waiting}
        elif self.process is not None and self.phase in ("Failed", "Succeeded"):
            code = self.process.returncode
            code = code if code >= 0 else 128 - code
            state = {"terminated": {"exitCode": code, "reason": "Error", **self.terminated}}
        container = {"name": "node", "state": state, "ready": False, "restartCount": 0}
        container |= {"image": "x", "imageID": "x"}
        status = {"phase": self.phase, "containerStatuses": [container], **self.pod_end}
        if self.unscheduled:
            condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
            condition["message"] = self.unscheduled
            status |= {"containerStatuses": [], "conditions": [condition]}
        return {
            "metadata": {"name": self.name, "labels": self.labels},
            "spec": {"containers": [{"name": "node"}], "terminationGracePeriodSeconds": GRACE},
            "status": status,
        }

    def stop(self) -> None:
        """End it as a pod that is deleted: SIGTERM to its program, SIGKILL after its grace."""
        if not self.is_gone():
            self.process.terminate()
            self.killer = threading.Timer(GRACE, self.kill)
            self.killer.daemon = True
            self.killer.start()

    def is_gone(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def kill(self) -> None:
        if self.killer is not None:
            self.killer.cancel()
        if not self.is_gone():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class KubeServer(ApiServer):
    """The cluster.

    Args:
        folder: for logs and the kubeconfig.
        variables: what a secret and the cluster's DNS would give to the machines.
    """

    def __init__(self, folder: Path, variables: dict[str, str] | None = None) -> None:
        self.folder, self.variables = folder, variables or {}
        self.trainer = True
        """Whether Kubeflow Trainer is installed."""
        self.program: str | None = None
        """Python that the machines run instead of the job's own command."""
        self.starts = True
        """Whether the machines' containers start; else the test says what they wait for."""
        self.makes_pods = True
        self.jobs: dict[str, dict[str, Any]] = {}
        self.jobsets: dict[str, dict[str, Any]] = {}
        self.machines: dict[str, list[Machine]] = {}
        self.created: list[dict[str, Any]] = []
        self.checked: list[dict[str, Any]] = []
        """Documents of dry runs."""
        self.beside: list[str] = []
        """Machines of an earlier job that were left when another of its name was created."""
        self.stopped: set[str] = set()
        """Machines that were stopped."""
        self.garbage: dict[str, float] = {}
        """When the JobSet of a deleted job is collected."""
        self.events: list[tuple[str, str, str]] = []
        """Warnings: the object's name, the reason and the message."""
        self.steps = {"step": ("1234", "Running")}
        """The pods of a pipeline's steps: their uid and phase."""
        self.forbidden = False
        """Whether the steps' account may not create TrainJobs."""
        self.webhook_fails = False
        self.failing = 0
        """So many of the next requests are answered 503."""
        super().__init__()
        context = {"cluster": "here", "user": "here", "namespace": "kubeflow"}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "clusters": [{"name": "here", "cluster": {"server": self.host}}],
            "users": [{"name": "here", "user": {}}],
            "contexts": [{"name": "here", "context": context}],
        }
        self.kubeconfig = folder / "kubeconfig"
        self.kubeconfig.write_text(yaml.safe_dump(config))

    def __exit__(self, *_: object) -> None:
        for machines in self.machines.values():
            for machine in machines:
                machine.kill()
        super().__exit__()

    def route(self, request: Handler, path: str, query: dict[str, str]) -> dict[str, Any]:
        method = request.command
        if self.failing:
            self.failing -= 1
            raise Refused(503, "the server is currently unable to handle the request")
        if not allowed(method, path) or (self.forbidden and method == "POST"):
            user = "system:serviceaccount:kubeflow:pipeline-runner"
            raise Refused(403, f'{path} is forbidden: User "{user}" cannot {VERBS[method]} it')
        name = path.rpartition("/")[2]
        if path.startswith(JOBS):
            name = "" if path == JOBS else name
            return self._jobs(method, name, query, request.body())
        self._collect()
        if path.startswith(f"{JOBSETS}/") and name in self.jobsets:
            return self.jobsets[name]
        if path == EVENTS:
            items = [
                {"involvedObject": {"name": name}, "reason": reason, "message": message}
                for name, reason, message in self.events
            ]
            items = [{"metadata": {"name": "e"}, **item} for item in items]
            return {"kind": "EventList", "apiVersion": "v1", "items": items}
        if path == PODS:
            labels = dict(pair.split("=") for pair in query["labelSelector"].split(","))
            pods = [m.document() for machines in self.machines.values() for m in machines]
            pods = [pod for pod in pods if labels.items() <= pod["metadata"]["labels"].items()]
            return {"kind": "PodList", "apiVersion": "v1", "items": pods}
        if path.startswith(f"{PODS}/") and name in self.steps:
            uid, phase = self.steps[name]
            metadata = {"name": name, "uid": uid}
            spec = {"serviceAccountName": "pipeline-runner", "containers": []}
            return {"metadata": metadata, "spec": spec, "status": {"phase": phase}}
        raise Refused(404, f"{path} not found")

    def _jobs(self, method: str, name: str, query: dict[str, str], body: bytes) -> dict[str, Any]:
        if not self.trainer:
            raise Refused(404, "the server could not find the requested resource")
        if method == "POST":
            if self.webhook_fails:
                reason = f'failed calling webhook "{WEBHOOK}": no endpoints available'
                raise Refused(500, f"Internal error occurred: {reason}")
            document = checked(json.loads(body))
            if query.get("dryRun") == "All":
                self.checked.append(document)
                return document
            return self._create(document)
        if name not in self.jobs:
            raise Refused(404, f'trainjobs.trainer.kubeflow.org "{name}" not found')
        if method == "DELETE":
            options = {"propagationPolicy": "Background", **json.loads(body or b"{}"), **query}
            self.delete(name, options["propagationPolicy"])
            return {"kind": "Status", "status": "Success"}
        return {**self.jobs[name], "status": {"conditions": self._conditions(name)}}

    def _create(self, document: dict[str, Any]) -> dict[str, Any]:
        name = document["metadata"]["name"]
        if name in self.jobs:
            raise Refused(409, f'trainjobs.trainer.kubeflow.org "{name}" already exists')
        self._collect()
        self.beside += [machine.name for machine in self.machines.get(name, [])]
        self.created.append(document)
        metadata = {**document["metadata"], "uid": str(uuid.uuid4())}
        self.jobs[name] = {**document, "metadata": metadata}
        self._make_jobset(name)
        return self.jobs[name]

    def _make_jobset(self, name: str) -> None:
        """Make a TrainJob's JobSet and its pods, as Kubeflow Trainer and JobSet do, unless there is
        one of its name."""
        if name in self.jobsets:
            return
        owner = {"kind": "TrainJob", "name": name, "uid": self.jobs[name]["metadata"]["uid"]}
        uid = str(uuid.uuid4())
        self.jobsets[name] = {"metadata": {"name": name, "uid": uid, "ownerReferences": [owner]}}
        machines = self.machines.setdefault(name, [])
        if not self.makes_pods:
            return
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        trainer = self.jobs[name]["spec"]["trainer"]
        assert trainer["command"][0] == "python"
        command = [*trainer["command"][1:], *trainer["args"]]
        command = [warm_python(), *(["-c", self.program] if self.program else command)]
        plain = {e["name"]: e["value"] for e in trainer.get("env", []) if "value" in e}
        for index in range(trainer["numNodes"]):
            environment = {
                **os.environ,
                "PET_NNODES": str(trainer["numNodes"]),
                "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
                "PET_NODE_RANK": str(index),
                "PET_MASTER_ADDR": "127.0.0.1",
                "PET_MASTER_PORT": str(port),
                **plain,
                **self.variables,
                "OMP_NUM_THREADS": "1",
                "PYTHONUNBUFFERED": "1",
            }
            started = command if self.starts else None
            machines.append(Machine(name, uid, index, started, environment, self.folder))

    def delete(self, name: str, propagation: str) -> None:
        for machine in self.machines.get(name, []):
            machine.stop()
            self.stopped.add(machine.name)
        if propagation == "Foreground":  # Trainer reconciles it while it waits for its dependents
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
            left = [m for m in machines if m.name not in self.stopped or not m.is_gone()]
            self.machines[name] = left

    def _conditions(self, name: str) -> list[dict[str, Any]]:
        """Return a TrainJob's conditions: those of the JobSet of its name, even if that is of an
        earlier job."""
        jobset = self.jobsets.get(name, {"metadata": {"uid": None}})
        uid = jobset["metadata"]["uid"]
        phases = {machine.phase for machine in self.machines[name] if machine.jobset == uid}
        end = "Failed" if "Failed" in phases else "Complete" if phases == {"Succeeded"} else None
        end = jobset["end"] = jobset.get("end") or end
        message = "jobset failed due to one or more job failures"
        if end != "Failed":
            message = "jobset completed"
        return [{"type": end, "status": "True", "reason": "r", "message": message}] if end else []

    def refusal(self, refused: Refused) -> dict:
        return {"kind": "Status", "status": "Failure", **super().refusal(refused)}

    def answer(self, request: Handler) -> None:
        url = urlsplit(request.path)
        if not url.path.endswith("/log"):
            super().answer(request)
            return
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        pod = url.path.split("/")[-2]
        every = (machine for machines in self.machines.values() for machine in machines)
        (machine,) = (machine for machine in every if machine.name == pod)
        since = datetime.now(UTC) - timedelta(seconds=int(query.get("sinceSeconds", 10**6)))
        lines = [(stamp, line) for stamp, line in machine.lines() if stamp >= since]
        text = ""
        for stamp, line in lines[-int(query.get("tailLines", 10**6)) :]:
            if query.get("timestamps", "").lower() == "true":  # as Go's RFC3339Nano
                line = f"{stamp:%Y-%m-%dT%H:%M:%S.%f}".rstrip("0") + f"Z {line}"
            text += f"{line}\n"
        with contextlib.suppress(BrokenPipeError):
            request.reply(200, text.encode(errors="surrogateescape"))
