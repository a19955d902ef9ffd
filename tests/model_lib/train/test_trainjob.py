"""Several machines: a TrainJob is created and followed, its failure explained, and it is deleted
whatever happens."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from model_lib import UserError
from model_lib.errors import WorkError
from model_lib.train.config import TrainConfig
from model_lib.train.kubernetes import Cluster
from model_lib.train.trainjob import Machines, job_document, job_name, require_trainer, train_on
from pipelines.placement import GPU_NODES, GPU_TOLERATIONS, MLFLOW, variables
from tests.helpers.kube_rules import POD
from tests.helpers.kube_server import KubeServer, Machine
from tests.helpers.training import train_config
from tests.helpers.warm_python import warm_python

ROOT = Path(__file__).parents[3]
MACHINES = Machines(
    nodes=2,
    image="registry.example/captioner-model@sha256:0",
    cpu=4,
    memory=24,
    gpu_resource="nvidia.com/gpu",
    gpu_count="0",
    gpu_node_selector=GPU_NODES,
    gpu_tolerations=GPU_TOLERATIONS,
    secret_name="captioner",
    secret_variables=variables(("HF_TOKEN",)),
)
ONE = replace(MACHINES, nodes=1)


def config(data: Path, output: Path, **options: Any) -> TrainConfig:
    options = {"epochs": 3, "batch_size": 9, "log_steps": 1, "checkpoint_steps": 1, **options}
    return train_config(data, output / "run", **options)


@pytest.fixture()
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubeServer]:
    """A cluster in which this process is a step."""
    monkeypatch.setattr("model_lib.train.job_view.POLL", 0.2)
    monkeypatch.setattr("model_lib.train.kubernetes.POLL", 0.05)
    secret = {"CAPTIONER_MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/run.db"}
    with KubeServer(tmp_path, variables=secret) as server:
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig))
        monkeypatch.setenv("KFP_POD_NAME", "step")
        monkeypatch.setenv("KFP_RUN_ID", "kfp-run")
        yield server


def pretend_trained(tmp_path: Path) -> None:
    """Leave what a training does, for machines that run something else."""
    (tmp_path / "run" / "best").mkdir(parents=True)
    (tmp_path / "run" / "best" / "training.json").write_text("{}")


@pytest.mark.soak
def test_two_machines_train_together(
    cluster: KubeServer, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cluster.failing = 2
    trained = train_on(MACHINES, config(data, tmp_path), "fingerprint")
    assert trained["model"] == f"{tmp_path}/run/best" and trained["step"] > 0
    log = capfd.readouterr().err
    assert log.count("train candidate: 24/24 steps") == 1, "the first machine's log, once"
    assert not cluster.jobs


def test_a_job_has_the_steps_rights_secrets_and_nodes(cluster: KubeServer, tmp_path: Path) -> None:
    cluster.program = "pass"
    pretend_trained(tmp_path)
    train_on(MACHINES, config(tmp_path, tmp_path), "fingerprint")
    (job,) = cluster.created
    assert job["metadata"]["ownerReferences"][0]["uid"] == "1234"
    trainer, (patch,) = job["spec"]["trainer"], job["spec"]["runtimePatches"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 1)
    assert trainer["image"] == MACHINES.image
    assert {"name": "KFP_RUN_ID", "value": "kfp-run"} in trainer["env"]
    sources = {
        v["name"]: v["valueFrom"]["secretKeyRef"] for v in trainer["env"] if "value" not in v
    }
    assert set(sources) == {*(f"CAPTIONER_{key}" for key in MLFLOW), "HF_TOKEN"}
    assert sources["HF_TOKEN"] == {"name": "captioner", "key": "HF_TOKEN", "optional": True}
    (machine,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    assert machine["template"]["spec"]["template"]["spec"] == {
        "serviceAccountName": "pipeline-runner",
        "nodeSelector": GPU_NODES,
        "tolerations": GPU_TOLERATIONS,
    }


@pytest.mark.parametrize("machines", [ONE, pytest.param(MACHINES, marks=pytest.mark.soak)])
def test_a_mistake_in_the_input_is_the_machines_own_line(
    cluster: KubeServer, tmp_path: Path, capfd: pytest.CaptureFixture[str], machines: Machines
) -> None:
    with pytest.raises(UserError, match=f"^{tmp_path}/nothing"):
        train_on(machines, config(tmp_path / "nothing", tmp_path), "fingerprint")
    log = capfd.readouterr().err
    assert "torch.distributed.elastic" not in log and "Traceback" not in log and not cluster.jobs


def test_a_failure_is_raised_with_the_machines_last_lines(
    cluster: KubeServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cluster.program = "import sys; print(*range(100), sep='\\n', file=sys.stderr); sys.exit(1)"
    with pytest.raises(WorkError) as failed:
        train_on(ONE, config(tmp_path, tmp_path), "fingerprint")
    assert re.fullmatch(
        r"TrainJob captioner-[0-9a-f]{16} failed: jobset failed due to one or more job failures; "
        r"captioner-\S+-node-0-0-\w+: Error \(exit code 1\); its machines' last lines are above",
        str(failed.value),
    )
    end = capfd.readouterr().err.partition("(exit code 1)\n")[2]
    assert end.splitlines() == [str(number) for number in range(40, 100)] and not cluster.jobs


def test_a_machine_that_is_killed_for_memory_says_so(
    cluster: KubeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.program = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    init = Machine.__init__

    def killed(machine: Machine, *arguments: Any) -> None:
        init(machine, *arguments)
        machine.terminated = {"reason": "OOMKilled", "message": "of 24 GiB"}
        machine.pod_end = {"reason": "Evicted", "message": "the node was low on memory"}

    monkeypatch.setattr(Machine, "__init__", killed)
    why = r"OOMKilled \(exit code 137\); of 24 GiB; Evicted: the node was low on memory$"
    with pytest.raises(WorkError, match=why):  # and no lines are above
        train_on(ONE, config(tmp_path, tmp_path), "fingerprint")


def test_lines_are_shown_as_they_are(
    cluster: KubeServer, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    odd = r"os.write(1, b'10%\r20% of it\nnot UTF-8: \xe9\n')"
    cluster.program = f"import os, time; {odd}; time.sleep(1); print('after', flush=True)"
    pretend_trained(tmp_path)
    train_on(ONE, config(tmp_path, tmp_path), "fingerprint")
    log = capfdbinary.readouterr().err.decode()
    for line in ("10%\r20% of it\n", "not UTF-8: \ufffd\n", "after\n"):
        assert log.count(line) == 1


def test_warnings_say_why_no_machine_is_created(
    cluster: KubeServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("model_lib.train.job_view.NO_PODS_SECONDS", 0.5)
    cluster.makes_pods = False
    name = job_name(config(tmp_path, tmp_path), "fingerprint")
    cluster.events = [(f"{name}-node-0", "FailedCreate", "exceeded quota")]
    cluster.events += [("other", "FailedCreate", "of another")]
    reason = "has no machine: FailedCreate: exceeded quota"
    with ThreadPoolExecutor(1) as threads:
        step = threads.submit(train_on, ONE, config(tmp_path, tmp_path), "fingerprint")
        while reason not in caplog.text and not step.done():
            time.sleep(0.01)
        time.sleep(1)  # in which it is not logged again
        cluster.delete(name, "Background")
        with pytest.raises(WorkError, match="it was deleted"):
            step.result()
    assert caplog.text.count(reason) == 1
    assert "of another" not in caplog.text


def test_a_machine_that_cannot_start_fails_the_job_and_one_without_a_node_waits(
    cluster: KubeServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("model_lib.train.job_view.START_SECONDS", 1.0)
    cluster.starts = False
    with ThreadPoolExecutor(1) as threads:
        step = threads.submit(train_on, ONE, config(tmp_path, tmp_path), "fingerprint")
        while not any(cluster.machines.values()):
            time.sleep(0.01)
        ((machine,),) = cluster.machines.values()
        machine.unscheduled = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
        time.sleep(2)
        assert step.running(), "a node may come"
        machine.unscheduled, machine.waiting = None, {"reason": "ErrImagePull", "message": "none"}
        time.sleep(0.5)
        machine.waiting = {"reason": "ImagePullBackOff", "message": "Back-off"}  # it shows both
        with pytest.raises(UserError, match=r"has not started for 0 minutes: ErrImagePull: none$"):
            step.result(60)
    assert caplog.text.count("waits: Unschedulable: 0/3 nodes are available: 3 Insufficient") == 1
    assert caplog.text.count("waits: ErrImagePull: none") == 1 and not cluster.jobs


def test_a_job_is_created_when_the_machines_of_the_one_before_are_gone(
    cluster: KubeServer, tmp_path: Path
) -> None:
    """Each machine may still save its checkpoint in the same output."""
    ignore = "signal.signal(15, lambda *_: open('ready', 'w'))"
    cluster.program = f"import os, signal, time; os.chdir({str(tmp_path)!r}); {ignore}; "
    cluster.program += "open('ignores', 'w'); time.sleep(3)"
    options = config(tmp_path, tmp_path)
    document = job_document(job_name(options, "fingerprint"), options, ONE, "a")
    client = Cluster()
    client.objects.create_namespaced_custom_object(*client.trainjobs, document)
    while not (tmp_path / "ignores").exists():
        time.sleep(0.01)
    cluster.program = "print('after')"
    pretend_trained(tmp_path)
    train_on(ONE, options, "fingerprint")
    assert len(cluster.created) == 2 and not cluster.beside and not cluster.jobs


def test_a_machine_is_stopped_in_its_first_moments(cluster: KubeServer, tmp_path: Path) -> None:
    """While it imports torch it does not handle signals yet: as process 1 it would get none."""
    cluster.program = "import time; time.sleep(300)"  # as it imports
    document = job_document("captioner-early", config(tmp_path, tmp_path), MACHINES, "a")
    start = time.monotonic()
    with Cluster().job(document):
        pass
    assert not cluster.jobs and not any(cluster.machines.values())
    assert time.monotonic() - start < POD["terminationGracePeriodSeconds"] / 2


@pytest.mark.soak
def test_a_step_that_is_stopped_deletes_its_job_and_a_second_one_resumes(
    cluster: KubeServer, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import json, sys; from model_lib.train import job_view, trainjob;"
        "from model_lib.train.config import TrainConfig;"
        "job_view.POLL = 0.2; machines, options = map(json.loads, sys.argv[1:]);"
        "config = TrainConfig(**options);"
        "print(json.dumps(trainjob.train_on(trainjob.Machines(**machines), config, 'f')))"
    )
    options = json.dumps(vars(config(data, tmp_path)))
    command = [warm_python(), "-c", code, json.dumps(asdict(ONE)), options]

    def start(until: Callable[[], object]) -> subprocess.Popen:
        step = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
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
    assert len(cluster.jobs) == 1, "nobody could delete it"
    cluster.steps = {"step": ("1234", "Failed"), "step-2": ("5678", "Running")}
    monkeypatch.setenv("KFP_POD_NAME", "step-2")
    last = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert last.returncode == 0, last.stderr
    assert len(cluster.created) == 3 and not cluster.jobs
    assert json.loads(last.stdout)["model"] == f"{tmp_path}/run/best"


def test_a_job_of_another_running_step_is_left_to_it(cluster: KubeServer, tmp_path: Path) -> None:
    ours = config(tmp_path, tmp_path)
    name = job_name(ours, "fingerprint")
    assert job_name(replace(ours, output=str(tmp_path / "another")), "fingerprint") != name
    cluster.steps["theirs"] = ("5678", "Running")
    owner = {"apiVersion": "v1", "kind": "Pod", "name": "theirs", "uid": "5678"}
    cluster.jobs[name] = {"metadata": {"name": name, "ownerReferences": [owner]}}
    cluster.machines[name] = []
    with pytest.raises(WorkError, match=f"TrainJob {name}: the step in pod theirs is using it"):
        train_on(MACHINES, ours, "fingerprint")
    assert set(cluster.jobs) == {name} and not cluster.created


def test_preflight_checks_the_jobs_that_the_step_would_send(
    cluster: KubeServer, tmp_path: Path
) -> None:
    candidates = [config(tmp_path, tmp_path), config(tmp_path, tmp_path, seed=1, processes=2)]
    require_trainer(candidates, MACHINES)
    assert not cluster.jobs
    client = Cluster()
    sent = [
        job_document("captioner-preflight", candidate, MACHINES, client.account, client.owners)
        for candidate in candidates
    ]
    assert cluster.checked == sent and sent[0]["spec"]["runtimePatches"] and sent[0] != sent[1]


def test_preflight_says_what_is_refused(
    cluster: KubeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPTIONER_RETRY_SECONDS", "0")

    def refusal(kind: type[Exception], machines: Machines = MACHINES) -> str:
        with pytest.raises(kind) as refused:
            require_trainer([config(tmp_path, tmp_path)], machines)
        return str(refused.value)

    invalid = replace(MACHINES, nodes="two")  # type: ignore[arg-type]
    assert re.search(r"Kubernetes refused: .*numNodes.* \(422\)", refusal(UserError, invalid))
    with monkeypatch.context() as patch:
        patch.setattr("model_lib.train.trainjob.MANAGER", "captioner")
        assert 'domain-prefixed path (such as "acme.io/foo") (403)' in refusal(UserError)
    cluster.webhook_fails = True
    assert re.search(r"failed calling webhook .* \(500\); try again later$", refusal(WorkError))
    cluster.forbidden = True
    assert re.search(r"is forbidden: .* \(403\); if .*docs/cluster\.md", refusal(UserError))
    cluster.trainer = cluster.forbidden = False
    assert "this cluster has no Kubeflow Trainer; if" in refusal(UserError)
    monkeypatch.setenv("KUBECONFIG", os.devnull)
    assert "train_nodes: there is no Kubernetes cluster here" in refusal(UserError)
