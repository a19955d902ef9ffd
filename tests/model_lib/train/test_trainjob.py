"""Several machines: a TrainJob is made, followed, told of if it fails, and removed whatever
happens."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from model_lib import UserError
from model_lib.errors import WorkError
from model_lib.train.cluster import Cluster
from model_lib.train.config import TrainConfig
from model_lib.train.trainjob import Machines, job_document, job_name, require_trainer, train_on
from pipelines.placement import GPU_NODES, GPU_TOLERATIONS, MLFLOW, variables
from tests.helpers.kube_rules import POD
from tests.helpers.kube_server import KubeServer, Machine
from tests.model_lib.train.test_distributed import OPTIONS
from tests.model_lib.train.test_survival import curves

MACHINES = Machines(
    count=2,
    image="registry.example/captioner-model@sha256:0",
    cpu=4,
    memory=24,
    gpu_resource="nvidia.com/gpu",
    gpu_count=0,
    node_selector=GPU_NODES,
    tolerations=GPU_TOLERATIONS,
    secret="captioner",
    secret_variables=variables(("HF_TOKEN",)),
    user=1000,
)


def config(data: Path, output: Path, **options: object) -> TrainConfig:
    return TrainConfig(
        **{"data": str(data), "output": str(output), "preset": "tiny", **OPTIONS, **options}
    )


@pytest.fixture()
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubeServer]:
    """A cluster in which this process is a step."""
    monkeypatch.setattr("model_lib.train.cluster.POLL", 0.2)
    variables = {"CAPTIONER_MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/run.db"}
    with KubeServer(tmp_path, variables=variables) as server:
        environment = {
            "KUBECONFIG": str(server.kubeconfig),
            "KFP_POD_NAME": "step",
            "KFP_POD_UID": "1234",
        }
        for name, value in {**environment, "KFP_RUN_ID": "kfp-run"}.items():
            monkeypatch.setenv(name, value)
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID"):
            monkeypatch.delenv(name, raising=False)
        yield server


@pytest.mark.soak
def test_two_machines_train_what_one_does(
    cluster: KubeServer, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cluster.failing = 2
    trained = train_on(MACHINES, config(data, tmp_path / "run"), "fingerprint")
    assert trained["model"] == f"{tmp_path}/run/best" and trained["step"] > 0
    assert set(curves(tmp_path / "run.db")["train_loss"]) == set(range(1, 25))
    said = capfd.readouterr().err
    assert said.count("train candidate: 24/24 steps") == 1, "the first machine's log, once"
    assert not cluster.jobs, "the job is removed"

    (job,) = cluster.created
    trainer = job["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"], trainer["image"]) == (
        2,
        1,
        MACHINES.image,
    )
    assert {"name": "KFP_RUN_ID", "value": "kfp-run"} in trainer["env"]
    secrets = {
        env["name"]: env["valueFrom"]["secretKeyRef"]
        for env in trainer["env"]
        if "valueFrom" in env
    }
    assert set(secrets) == {*(f"CAPTIONER_{key}" for key in MLFLOW), "HF_TOKEN"}
    assert secrets["HF_TOKEN"] == {"name": "captioner", "key": "HF_TOKEN", "optional": True}
    assert job["metadata"]["ownerReferences"][0]["uid"] == "1234"
    (patch,) = job["spec"]["runtimePatches"]
    (machine,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = machine["template"]["spec"]["template"]["spec"]
    assert (pod["serviceAccountName"], pod["nodeSelector"]) == ("pipeline-runner", GPU_NODES)
    assert pod["tolerations"] == GPU_TOLERATIONS and pod["securityContext"]["runAsNonRoot"]


def train_one(data: Path, tmp_path: Path, count: int = 1) -> dict[str, Any]:
    return train_on(replace(MACHINES, count=count), config(data, tmp_path / "run"), "fingerprint")


def finished_already(tmp_path: Path) -> None:
    """Leave what a training would, for machines that run something else."""
    (tmp_path / "run" / "best").mkdir(parents=True)
    (tmp_path / "run" / "best" / "training.json").write_text("{}")


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_a_mistake_is_the_users_and_told_in_the_machines_own_line(
    cluster: KubeServer, tmp_path: Path, capfd: pytest.CaptureFixture[str], count: int
) -> None:
    with pytest.raises(UserError, match=f"^{tmp_path}/nothing: no such data set"):
        train_one(tmp_path / "nothing", tmp_path, count)
    said = capfd.readouterr().err
    assert "torch.distributed.elastic" not in said and "Traceback" not in said and not cluster.jobs


def test_a_failure_is_raised_with_the_machines_last_lines(
    cluster: KubeServer, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cluster.program = "import sys; print(*range(100), sep='\\n', file=sys.stderr); sys.exit(1)"
    with pytest.raises(WorkError) as failed:
        train_one(data, tmp_path)
    assert re.fullmatch(
        r"TrainJob captioner-[0-9a-f]{16} failed: jobset failed due to one or more job failures; "
        r"captioner-\S+-node-0-0-\w+: Error \(exit code 1\); its machines' last lines are above",
        str(failed.value),
    )
    end = capfd.readouterr().err.partition("(exit code 1)\n")[2]
    assert end.splitlines() == [str(number) for number in range(40, 100)] and not cluster.jobs


def test_a_machine_without_memory_is_known_by_its_reason(
    cluster: KubeServer, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.program = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    init = Machine.__init__

    def killed(machine: Machine, *arguments: Any) -> None:
        init(machine, *arguments)
        machine.reason, machine.message = "OOMKilled", "of 24 GiB"
        machine.pod_reason = ("Evicted", "the node was low on memory")

    monkeypatch.setattr(Machine, "__init__", killed)
    why = r"OOMKilled \(exit code 137\); of 24 GiB; Evicted: the node was low on memory$"
    with pytest.raises(WorkError, match=why):  # and no lines are above
        train_one(data, tmp_path)


def test_lines_are_shown_as_they_are(
    cluster: KubeServer, data: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    odd = r"os.write(1, b'10%\r20% of it\nnot UTF-8: \xe9\n')"
    cluster.program = f"import os, time; {odd}; time.sleep(1); print('after', flush=True)"
    finished_already(tmp_path)
    train_one(data, tmp_path)
    said = capfdbinary.readouterr().err.decode()
    assert (
        said.count("10%\r20% of it\n")
        == said.count("not UTF-8: \ufffd\n")
        == said.count("after\n")
        == 1
    )


def test_why_no_machine_is_made_is_told(
    cluster: KubeServer,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("model_lib.train.job_view.NO_PODS", 0.5)
    cluster.makes_pods = False
    name = job_name(config(data, tmp_path / "run"), "fingerprint")
    cluster.events = [
        (f"{name}-node-0", "FailedCreate", "exceeded quota"),
        ("other", "FailedCreate", "of another"),
    ]
    threading.Timer(2, lambda: cluster.delete(name, "Background")).start()
    with pytest.raises(WorkError, match="it was deleted"):
        train_one(data, tmp_path)
    assert (
        caplog.text.count("has no machine: FailedCreate: exceeded quota") == 1
        and "of another" not in caplog.text
    )


def waiting(server: KubeServer, step: threading.Thread, **machine: Any) -> None:
    """Let the one machine of the job that a step makes wait for something."""
    deadline = time.monotonic() + 60
    while not any(server.machines.values()):
        assert step.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    ((one,),) = server.machines.values()
    for name, value in machine.items():
        setattr(one, name, value)


def test_what_a_machine_waits_for_is_told_and_ends_the_job_if_it_is_in_vain(
    cluster: KubeServer,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("model_lib.train.job_view.STUCK", 2.0)
    cluster.starts = False
    failures: list[BaseException] = []

    def run() -> None:
        try:
            train_one(data, tmp_path)
        except BaseException as error:
            failures.append(error)

    monkeypatch.setattr(
        "model_lib.train.trainjob.signal.signal", lambda *_: None
    )  # of the main thread only
    step = threading.Thread(target=run)
    step.start()
    waiting(cluster, step, unscheduled="0/3 nodes are available: 3 Insufficient nvidia.com/gpu.")
    time.sleep(3)
    assert step.is_alive(), "a node may come"
    pulls = [
        {"reason": "ErrImagePull", "message": "not found"},
        {"reason": "ImagePullBackOff", "message": "Back-off"},
    ]
    waiting(cluster, step, unscheduled=None, waiting=pulls[0])
    while step.is_alive():
        time.sleep(0.3)
        waiting_now = pulls[int(time.monotonic() * 2) % 2]
        for machines in cluster.machines.values():
            for machine in machines:
                machine.waiting = waiting_now
    (failure,) = failures
    assert isinstance(failure, UserError)
    assert str(failure).endswith("has not started for 0 minutes: ImagePullBackOff: not found")
    assert caplog.text.count("waits: Unschedulable: 0/3 nodes are available: 3 Insufficient") == 1
    assert caplog.text.count("waits: ErrImagePull: not found") == 1 and not cluster.jobs


def test_a_job_is_made_when_the_machines_of_the_one_before_are_gone(
    cluster: KubeServer, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each machine may still save its checkpoint in the same output."""
    cluster.program = (
        "import signal, time; signal.signal(15, lambda *_: None); print('before', flush=True); "
        "time.sleep(3)"
    )
    document = job_document(
        job_name(config(data, tmp_path / "run"), "fingerprint"),
        config(data, tmp_path),
        MACHINES,
        "a",
    )
    client = Cluster()
    client.objects.create_namespaced_custom_object(*client._arguments(), document)
    time.sleep(1)  # until it heeds no SIGTERM
    cluster.program = "print('after')"
    finished_already(tmp_path)
    train_one(data, tmp_path)
    assert len(cluster.created) == 2 and not cluster.beside and not cluster.jobs


def test_a_machine_is_stopped_in_its_first_moments(
    cluster: KubeServer, data: Path, tmp_path: Path
) -> None:
    """While it imports torch it has not asked for signals yet: as process 1 it would get none."""
    cluster.program = "import time; time.sleep(300)"  # as it imports
    client = Cluster()
    document = job_document("captioner-early", config(data, tmp_path / "run"), MACHINES, "a")
    began = time.monotonic()
    with client.job(document):
        pass
    assert not cluster.jobs and not any(cluster.machines.values())
    assert time.monotonic() - began < POD["terminationGracePeriodSeconds"] / 2


def test_a_job_that_is_deleted_is_followed_no_longer(
    cluster: KubeServer, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cluster.program = "import time; print('at work', flush=True); time.sleep(60)"
    threading.Timer(2, lambda: cluster.delete(next(iter(cluster.jobs)), "Background")).start()
    with pytest.raises(WorkError, match="it was deleted"):
        train_one(data, tmp_path)
    assert capfd.readouterr().err.count("at work") == 1


def test_machines_of_another_job_of_the_same_name_are_not_its_own(
    cluster: KubeServer, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cluster.program = "import time; print('ours', flush=True); time.sleep(1)"
    name = job_name(config(data, tmp_path / "run"), "fingerprint")
    finished_already(tmp_path)
    theirs = [sys.executable, "-c", "import time; print('theirs', flush=True); time.sleep(60)"]

    def appear() -> None:
        while not cluster.machines.get(name):
            time.sleep(0.01)
        other = Machine(name, "0" * 36, 0, theirs, os.environ, tmp_path)
        cluster.machines[name].insert(0, other)
        cluster.stopped.add(other.name)
        threading.Timer(2, other.kill).start()

    threading.Thread(target=appear).start()
    train_one(data, tmp_path)
    said = capfd.readouterr().err
    assert (
        "ours" in said
        and "theirs" not in said
        and (tmp_path / f"{name}-node-0-0-00000.log").read_text() == "theirs\n"
    )


@pytest.mark.soak
def test_a_step_that_is_stopped_removes_its_job_and_a_second_one_goes_on(
    cluster: KubeServer, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = config(data, tmp_path / "run").to_dict()
    code = (
        "import json, sys; from model_lib.train import cluster, trainjob;"
        "from model_lib.train.config import TrainConfig;"
        "cluster.POLL = 0.2; machines, options = map(json.loads, sys.argv[1:]);"
        "config = TrainConfig.from_options(**options);"
        "print(json.dumps(trainjob.train_on(trainjob.Machines(**machines), config, 'f')))"
    )
    arguments = {name: value for name, value in options.items() if value is not None}
    command = [
        sys.executable,
        "-c",
        code,
        json.dumps(asdict(replace(MACHINES, count=1))),
        json.dumps(arguments),
    ]

    def start(until: Callable[[], object]) -> subprocess.Popen:
        step = subprocess.Popen(
            command, cwd=Path(__file__).parents[3], stdout=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 120
        while not until():
            assert step.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        return step

    step = start(lambda: list(tmp_path.glob("run/checkpoints/*/manifest.json")))
    step.send_signal(signal.SIGTERM)
    assert step.wait(60) == 143 and not cluster.jobs
    step = start(lambda: cluster.jobs)
    step.kill()
    step.wait()
    assert len(cluster.jobs) == 1, "nobody could remove it"
    cluster.steps = {"step": ("1234", "Failed"), "step-2": ("5678", "Running")}
    monkeypatch.setenv("KFP_POD_NAME", "step-2")
    monkeypatch.setenv("KFP_POD_UID", "5678")
    last = subprocess.run(
        command, cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=200
    )
    assert last.returncode == 0, last.stderr
    assert "of an attempt before is removed" in last.stderr and len(cluster.created) == 3
    assert json.loads(last.stdout)["model"] == f"{tmp_path}/run/best" and not cluster.jobs
    assert len(curves(tmp_path / "run.db")["train_loss"]) == 24


def test_a_job_that_another_step_is_at_is_left_to_it(
    cluster: KubeServer, data: Path, tmp_path: Path
) -> None:
    ours = config(data, tmp_path / "run")
    name = job_name(ours, "fingerprint")
    assert job_name(replace(ours, output=str(tmp_path / "another")), "fingerprint") != name
    cluster.steps["theirs"] = ("5678", "Running")
    owner = {"apiVersion": "v1", "kind": "Pod", "name": "theirs", "uid": "5678"}
    cluster.jobs[name] = {"metadata": {"name": name, "ownerReferences": [owner]}}
    cluster.machines[name] = []
    with pytest.raises(
        WorkError, match=f"TrainJob {name}: the step in pod theirs is at it; wait for its end, or"
    ):
        train_on(MACHINES, ours, "fingerprint")
    assert set(cluster.jobs) == {name} and not cluster.created


def test_preflight_rehearses_the_jobs_that_the_step_would_send(
    cluster: KubeServer, data: Path, tmp_path: Path
) -> None:
    candidates = [
        config(data, tmp_path / "run"),
        config(data, tmp_path / "run", seed=1, processes=2),
    ]
    require_trainer(candidates, MACHINES)
    assert not cluster.jobs and len(cluster.rehearsed) == 2
    for rehearsed, candidate in zip(cluster.rehearsed, candidates, strict=True):
        sent = job_document(
            "captioner-preflight", candidate, MACHINES, "pipeline-runner", Cluster().owner()
        )
        assert rehearsed == sent and rehearsed["spec"]["runtimePatches"]


def test_what_kubeflow_trainers_webhook_refuses_is_told_by_preflight(
    cluster: KubeServer, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model_lib.train.trainjob.MANAGER", "captioner")
    with pytest.raises(
        UserError, match=r"must be a domain-prefixed path \(such as \"acme.io/foo\"\) \(403\)"
    ):
        require_trainer([config(data, tmp_path / "run")], MACHINES)


def test_without_kubeflow_trainer_or_a_cluster_it_is_said_at_once(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rehearse() -> None:
        require_trainer([config(data, tmp_path / "run")], MACHINES)

    monkeypatch.setenv("CAPTIONER_RETRY_SECONDS", "0")
    with KubeServer(tmp_path, trainer=False) as server:
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig))
        for ask in (rehearse, lambda: train_one(data, tmp_path)):
            with pytest.raises(
                UserError,
                match=r"train_nodes: this cluster has no Kubeflow Trainer, .*; install it",
            ):
                ask()
        server.trainer = server.forbidden = True
        with pytest.raises(
            UserError, match=r"is forbidden: .* \(403\); kubectl apply -f deploy/trainer\.yaml"
        ):
            rehearse()
        server.forbidden, server.webhook_away = False, True
        with pytest.raises(
            WorkError, match=r"failed calling webhook .* \(500\); this may pass: start again$"
        ):
            rehearse()
        server.webhook_away = False
        rehearse()
        assert not server.jobs
    monkeypatch.setenv("KUBECONFIG", os.devnull)
    with pytest.raises(UserError, match="several machines: this is no Kubernetes cluster"):
        rehearse()


def test_an_answer_that_refuses_is_one_line(
    cluster: KubeServer, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"Kubernetes refused: .*numNodes.* \(422\)"):
        train_on(replace(MACHINES, count="two"), config(data, tmp_path / "run"), "f")  # type: ignore[arg-type]
