"""Several machines: a TrainJob is made, followed, told of if it fails, and removed whatever happens."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from model_lib import UserError
from model_lib.errors import WorkError
from model_lib.train.config import TrainConfig
from model_lib.train.trainjob import Machines, job_name, require_trainer, train_on
from pipelines.placement import GPU_NODES, GPU_TOLERATIONS, MLFLOW, variables
from tests.kube_server import KubeServer
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
    return TrainConfig(**{"data": str(data), "output": str(output), "preset": "tiny", **OPTIONS, **options})


@pytest.fixture()
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubeServer]:
    """A cluster in which this process is a step."""
    monkeypatch.setattr("model_lib.train.cluster.POLL", 0.2)
    variables = {"CAPTIONER_MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/run.db"}
    with KubeServer(tmp_path, variables=variables) as server:
        environment = {"KUBECONFIG": str(server.kubeconfig), "KFP_POD_NAME": "step", "KFP_POD_UID": "1234"}
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
    assert (trainer["numNodes"], trainer["numProcPerNode"], trainer["image"]) == (2, 1, MACHINES.image)
    assert {"name": "KFP_RUN_ID", "value": "kfp-run"} in trainer["env"]
    secrets = {env["name"]: env["valueFrom"]["secretKeyRef"] for env in trainer["env"] if "valueFrom" in env}
    assert set(secrets) == {*(f"CAPTIONER_{key}" for key in MLFLOW), "HF_TOKEN"}
    assert secrets["HF_TOKEN"] == {"name": "captioner", "key": "HF_TOKEN", "optional": True}
    assert job["metadata"]["ownerReferences"][0]["uid"] == "1234"
    (patch,) = job["spec"]["runtimePatches"]
    (machine,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = machine["template"]["spec"]["template"]["spec"]
    assert (pod["serviceAccountName"], pod["nodeSelector"]) == ("pipeline-runner", GPU_NODES)
    assert pod["tolerations"] == GPU_TOLERATIONS and pod["securityContext"]["runAsNonRoot"]


def test_a_failure_is_raised_with_the_machines_last_lines(
    cluster: KubeServer, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(WorkError, match=r"TrainJob captioner-[0-9a-f]{16} failed: jobset failed due to one or more"):
        train_on(replace(MACHINES, count=1), config(tmp_path / "nothing", tmp_path / "run"), "fingerprint")
    assert f"{tmp_path}/nothing: no such data set" in capfd.readouterr().err
    assert not cluster.jobs


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
    command = [sys.executable, "-c", code, json.dumps(asdict(replace(MACHINES, count=1))), json.dumps(arguments)]

    def start(until: Callable[[], object]) -> subprocess.Popen:
        step = subprocess.Popen(command, cwd=Path(__file__).parents[3], stdout=subprocess.PIPE, text=True)
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
    last = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=200)
    assert last.returncode == 0, last.stderr
    assert "of an attempt before is removed" in last.stderr and len(cluster.created) == 3
    assert json.loads(last.stdout)["model"] == f"{tmp_path}/run/best" and not cluster.jobs
    assert len(curves(tmp_path / "run.db")["train_loss"]) == 24


def test_a_job_that_another_step_is_at_is_left_to_it(cluster: KubeServer, data: Path, tmp_path: Path) -> None:
    ours = config(data, tmp_path / "run")
    name = job_name(ours, "fingerprint")
    assert job_name(replace(ours, output=str(tmp_path / "another")), "fingerprint") != name
    cluster.steps["theirs"] = ("5678", "Running")
    owner = {"apiVersion": "v1", "kind": "Pod", "name": "theirs", "uid": "5678"}
    cluster.jobs[name] = {"metadata": {"name": name, "ownerReferences": [owner]}}
    cluster.machines[name] = []
    with pytest.raises(UserError, match=f"TrainJob {name}: the step in pod theirs is at it; wait for its end, or"):
        train_on(MACHINES, ours, "fingerprint")
    assert set(cluster.jobs) == {name} and not cluster.created


def test_without_kubeflow_trainer_or_a_cluster_it_is_said_at_once(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with KubeServer(tmp_path, trainer=False) as server:
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig))
        for ask in (require_trainer, lambda: train_on(MACHINES, config(data, tmp_path / "run"), "f")):
            with pytest.raises(UserError, match=r"train_nodes: this cluster has no Kubeflow Trainer, .*; install it"):
                ask()
        server.trainer = server.forbidden = True
        with pytest.raises(UserError, match=r"is forbidden \(403\); kubectl apply -f deploy/trainer\.yaml"):
            require_trainer()
        server.forbidden = False
        require_trainer()
        assert not server.jobs
    monkeypatch.setenv("KUBECONFIG", os.devnull)
    with pytest.raises(UserError, match="several machines: this is no Kubernetes cluster"):
        require_trainer()


def test_an_answer_that_refuses_is_one_line(cluster: KubeServer, data: Path, tmp_path: Path) -> None:
    with pytest.raises(WorkError, match=r"Kubernetes refused: .*numNodes.* \(422\)"):
        train_on(replace(MACHINES, count="two"), config(data, tmp_path / "run"), "f")  # type: ignore[arg-type]
