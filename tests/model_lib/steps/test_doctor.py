"""What is there and what is not, each by the real thing; and what to do about it."""

import json
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import mlflow
import pytest
import torch

from model_lib.model import precision
from model_lib.steps.doctor import DoctorConfig, Finding, doctor, table
from tests.helpers.hub import running_hub, use_hub
from tests.helpers.isolated import link_packages, run_isolated
from tests.helpers.kfp_server import KfpServer
from tests.helpers.services import Faults, free_port, gcs_emulator, mlflow_server, refusing, using

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def plain_environment(environment: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No tracking server, token or hidden GPU, and an empty working directory."""
    for name in ("CUDA_VISIBLE_DEVICES", "HF_TOKEN", "KFP_TOKEN", "DOCKER_HOST"):
        environment.delenv(name, raising=False)
    environment.chdir(tmp_path)
    yield


def finding(name: str, **options: str) -> Finding:
    return doctor(DoctorConfig(**options))[name]


def test_what_this_machine_has_is_ok() -> None:
    findings = doctor(DoctorConfig())
    for name in ("Python", "packages", "packages: model", "packages: tracking", "machine", "disk"):
        assert findings[name].state == "ok" and not findings[name].remedy, findings[name]
    assert f"torch {torch.__version__}" in findings["packages: model"].text
    assert findings["MLflow"].state == "absent" and "MLFLOW_TRACKING_URI" in table(findings)[-1]
    assert not (Path.cwd() / "runs").exists(), "it made no store"


def test_java_is_absent_or_shown_with_its_version(java: None) -> None:
    assert finding("Java").state == "ok" and "version" in finding("Java").text


def test_without_java_its_package_is_named() -> None:
    assert shutil.which("java") is None
    assert finding("Java").state == "absent"
    assert finding("Java").remedy == "apt-get install default-jre-headless"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_a_gpu_that_torch_cannot_use_fails_and_a_hidden_one_is_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "DEVICES", tmp_path)
    assert finding("GPU").state == "absent"
    (tmp_path / "nvidia0").touch()
    failed = finding("GPU")
    assert failed.state == "failed" and "pytorch.org" in failed.remedy
    assert f"torch {torch.__version__} for CUDA" in failed.text
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert (
        finding("GPU").state == "absent" and "unset CUDA_VISIBLE_DEVICES" in finding("GPU").remedy
    )


def test_programs_that_are_not_there_or_do_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:9")
    if shutil.which("docker"):
        assert "start its service" in finding("Docker").remedy
    monkeypatch.setenv("PATH", str(tmp_path))
    findings = doctor(DoctorConfig())
    assert findings["Docker"] == Finding(
        "absent", "none; run --runner docker and the images need it", "apt-get install docker.io"
    )
    assert "needs g++ (apt-get install g++)" in findings["torch.compile"].text


def test_a_tracking_server_is_written_to_and_left_without_a_run(tmp_path: Path) -> None:
    with mlflow_server(tmp_path) as address:
        result = finding("MLflow", tracking=address)
        assert result.state == "ok" and f"{address}, version {mlflow.__version__}" in result.text
        client = mlflow.MlflowClient(address)
        (experiment,) = client.search_experiments(filter_string="name = 'captioner'")
        assert not client.search_runs([experiment.experiment_id])
    with refusing(403) as (address, _):
        result = finding("MLflow", tracking=address)
    assert result.state == "failed" and f"MLflow at {address}" in result.text


def test_a_bucket_is_listed_written_read_and_deleted_from(tmp_path: Path) -> None:
    faults = Faults(0.0, seed=0)
    with using(gcs_emulator("images", tmp_path, faults), "gs"):
        result = finding("bucket", bucket="gs://images/folder")
        text = "gs://images/folder: files can be written, listed, read, deleted"
        assert result == Finding("ok", text)
        missing = finding("bucket", bucket="gs://other")
        assert missing.state == "failed" and "gs://other/captioner-doctor-" in missing.text
        faults.authorization = "Bearer somebody"
        refused = finding("bucket", bucket="gs://images")
        assert refused.state == "failed" and "roles/storage.objectUser" in refused.remedy
    assert finding("bucket", bucket="/proc/x").remedy == "choose another folder"


def test_the_hub_is_named_with_its_user_or_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache" / "models--team--captions").mkdir(parents=True)
    assert "HF_HUB_OFFLINE is set" in finding("hub").text
    with running_hub(monkeypatch, tmp_path / "cache") as hub:
        hub.writers["hf_write"] = "team"
        result = finding("hub")
        assert result.state == "ok" and f"{hub.address}, without a token" in result.text
        assert result.text.endswith(f"in its cache {tmp_path}/cache: team/captions")
        monkeypatch.setenv("HF_TOKEN", "hf_write")
        assert f"{hub.address}, as team" in finding("hub").text
        monkeypatch.setenv("HF_TOKEN", "hf_old")
        assert finding("hub").state == "failed" and "set HF_TOKEN" in finding("hub").remedy
        use_hub(monkeypatch, "http://127.0.0.1:9")
        away = finding("hub")
    assert away.state == "absent" and "cannot be reached" in away.text
    assert "team/captions" in away.text and away.remedy.startswith("mirror it into a bucket")


def test_a_kubeflow_server_is_told_from_a_page_to_sign_in(tmp_path: Path) -> None:
    with KfpServer() as server:
        assert finding("Kubeflow", host=server.host).state == "ok"
    with refusing(401) as (address, _):
        assert "set KFP_TOKEN" in finding("Kubeflow", host=address).remedy
    with refusing(200, b"<html>Sign in</html>") as (address, _):
        assert "set KFP_TOKEN" in finding("Kubeflow", host=address).remedy
    away = finding("Kubeflow", host=f"http://127.0.0.1:{free_port()}")
    assert away.state == "failed" and "kubectl port-forward" in away.remedy


def test_a_server_that_never_answers_ends_with_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    doctor(DoctorConfig())  # imports what the others need
    monkeypatch.setattr("model_lib.steps.doctor.TIMEOUT", 3.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        result = finding("Kubeflow", host=f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert result == Finding("failed", "Kubeflow: no answer within 3 seconds")


def test_packages_that_are_missing_are_named_with_the_command(tmp_path: Path) -> None:
    """Where the package is installed without extras: the command fails, as without torch nothing
    can be trained or captioned."""
    packages = link_packages(tmp_path / "packages", "captioner")
    code = f"sys.path.append({str(ROOT)!r})\nfrom model_lib.cli import main\n"
    code += "try:\n    main(['doctor', '--json'])\nexcept SystemExit as stop:\n    print(stop.code)"
    text, _, exit_code = run_isolated(packages, tmp_path, code).strip().rpartition("\n")
    rows = {row.pop("check"): row for row in json.loads(text)}
    assert exit_code == "1" and rows["packages"]["state"] == "ok"
    needed = rows["packages: model"]
    assert needed["state"] == "failed" and "no torch, no transformers" in needed["text"]
    assert needed["remedy"] == "pip install 'captioner[model]'"
    for name in ("evaluate", "tracking", "buckets", "pipelines", "app", "serve"):
        assert rows[f"packages: {name}"]["state"] == "absent"
    assert rows["GPU"]["text"] == "unknown without torch"


def test_the_table_has_a_row_a_check(captioner: Callable[..., CompletedProcess]) -> None:
    done = captioner("doctor", "--host", "http://127.0.0.1:9")
    rows = done.stdout.splitlines()
    assert done.returncode == 1 and done.stderr == "", done.stderr
    assert rows[0].startswith("Python ") and rows[-1].startswith("Kubeflow ") and len(rows) == 18
    assert "failed" in rows[-1] and "; to do: kubectl port-forward" in rows[-1]
