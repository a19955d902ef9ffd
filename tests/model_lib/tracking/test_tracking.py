"""A pipeline's runs in MLflow: one parent, a nested run for each candidate, closed whatever
happens."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import mlflow
import pytest

from model_lib import UserError, __version__
from model_lib.tracking.runs import Run, RunData
from model_lib.tracking.server import (
    MlflowTracking,
    adopt_secret,
    require_mlflow,
    tracking_from_environment,
)
from tests.helpers.services import empty_store, mlflow_server, postgres_programs, postgres_server
from tests.helpers.tracked import step
from tests.helpers.warm_python import warm_python


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server over SQLite, or over a new PostgreSQL if CAPTIONER_TEST_POSTGRES is set
    (docs/mlflow.md)."""
    with ExitStack() as stack:
        store = None
        if os.environ.get("CAPTIONER_TEST_POSTGRES"):
            programs = postgres_programs()
            assert programs is not None, "PostgreSQL is not installed"
            store = stack.enter_context(postgres_server(programs))
        yield stack.enter_context(mlflow_server(tmp_path_factory.mktemp("mlflow"), store))


@pytest.fixture()
def start(tmp_path: Path) -> Callable[..., Run]:
    """A function that starts a candidate's run, with an output folder for each key or name."""

    def start(
        tracking: MlflowTracking,
        name: str,
        key: str | None = None,
        params: Mapping[str, Any] = {},
        tags: Mapping[str, str] = {},
        step: int = 0,
    ) -> Run:
        folder = tmp_path / (key or name)
        folder.mkdir(exist_ok=True)
        return tracking.start(name, key, params, tags, str(folder), step)

    return start


def test_candidates_are_nested_under_the_pipelines_run(
    server: str, environment: pytest.MonkeyPatch, start: Callable[..., Run]
) -> None:
    tracking = step(environment, MLFLOW_TRACKING_URI=server, KFP_RUN_ID="kfp-1")
    tracking.open_pipeline("train-captioner 1")
    tracking.open_pipeline("train-captioner 1")  # a retry
    with start(tracking, "one", params={"epochs": 3}, tags={"a": "b"}) as run:
        run.log({"loss": 1.0}, 1)
    start(tracking, "two")

    def runs() -> dict[str, mlflow.entities.Run]:
        runs = mlflow.MlflowClient(server).search_runs([tracking.experiment_id])
        return {run.info.run_name: run for run in runs}

    parent = tracking.pipeline_run().info.run_id
    assert runs().keys() == {"train-captioner 1", "one", "two"}
    assert runs()["train-captioner 1"].info.run_id == parent
    assert {runs()[name].data.tags["mlflow.parentRunId"] for name in ("one", "two")} == {parent}
    tracking.close_pipeline(succeeded=True)
    status = {name: run.info.status for name, run in runs().items()}
    assert status == {"train-captioner 1": "FINISHED", "one": "FINISHED", "two": "FAILED"}


def test_candidates_that_begin_at_once_have_the_same_data_set(
    server: str, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tracking = step(environment, MLFLOW_TRACKING_URI=server)
    tracking.require_answer()
    barrier = threading.Barrier(4)

    def begin(number: int) -> str:
        folder = tmp_path / str(number)
        folder.mkdir()
        data = RunData("coco-train", f"{number // 4:064}", "gs://b/data", "training", 9)
        run = tracking.start(str(number), None, {}, {}, str(folder), data=data)
        barrier.wait()
        with run:
            return str(run.run_id)

    with ThreadPoolExecutor(4) as pool:
        ids = list(pool.map(begin, range(12)))
    for run_id in ids:
        (row,) = tracking.client.get_run(run_id).inputs.dataset_inputs
        assert (row.dataset.source, row.tags[0].value) == ('{"uri": "gs://b/data"}', "training")
        assert row.dataset.profile == '{"num_rows": 9}'


KILLED = """
import os, signal, sys, time
import model_lib.tracking.mlflow_run
from model_lib.tracking.server import tracking_from_environment
model_lib.tracking.mlflow_run.INTERVAL = 0.05
start = ("killed", "key-of-killed", {"epochs": 3}, {}, sys.argv[1], int(sys.argv[2]) - 1)
with tracking_from_environment().start(*start) as run:
    run.log({"loss": 2.0}, int(sys.argv[2]))
    while run.cursor < os.path.getsize(sys.argv[1] + "/metrics.jsonl"):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_candidate_goes_on_in_a_retry_and_in_another_pipeline_run(
    server: str, environment: pytest.MonkeyPatch, tmp_path: Path, start: Callable[..., Run]
) -> None:
    client = mlflow.MlflowClient(server)
    (tmp_path / "key-of-killed").mkdir()

    def killed_at(step: int) -> str:
        """Let a process start or resume the candidate, and die; return its run."""
        command = [warm_python(), "-c", KILLED, str(tmp_path / "key-of-killed"), str(step)]
        process = subprocess.run(command, env=dict(os.environ), timeout=120)
        assert process.returncode == -signal.SIGKILL
        condition = "tags.`captioner.run` = 'key-of-killed'"
        (run,) = client.search_runs([tracking.experiment_id], condition)
        assert run.info.status == "RUNNING", "nobody could end it"
        return str(run.info.run_id)

    tracking = step(environment, MLFLOW_TRACKING_URI=server, KFP_RUN_ID="kfp-first")
    tracking.open_pipeline("first")
    first = tracking.pipeline_run().info.run_id
    run_id = killed_at(1)
    assert killed_at(2) == run_id, "a retry goes on in the same run"
    tracking.close_pipeline(succeeded=False)
    assert client.get_run(run_id).info.status == "FAILED"

    tracking = step(environment, KFP_RUN_ID="kfp-second")
    tracking.open_pipeline("second")
    assert killed_at(3) == run_id
    tracking.close_pipeline(succeeded=False)
    status = client.get_run(run_id).info.status
    assert status == "FAILED", "it is closed with the pipeline run that went on with it"
    with start(tracking, "killed", "key-of-killed", {"epochs": 3}, step=3) as run:
        assert client.get_run(run_id).info.status == "RUNNING"
        run.log({"loss": 1.0}, 4)
    assert run.run_id == run_id
    ended = client.get_run(run_id)
    tags = ended.data.tags
    assert ended.info.status == "FINISHED" and ended.data.params == {"epochs": "3"}
    assert tags["mlflow.parentRunId"] == tracking.pipeline_run().info.run_id != first
    assert tags["kfp.pipeline_run_id"] == "kfp-second"
    points = client.get_metric_history(run_id, "loss")
    assert [(point.step, point.value) for point in points] == [(1, 2), (2, 2), (3, 2), (4, 1)]


def test_a_finished_candidate_stays_with_the_pipeline_run_that_trained_it(
    server: str, environment: pytest.MonkeyPatch, start: Callable[..., Run]
) -> None:
    client = mlflow.MlflowClient(server)
    tracking = step(environment, MLFLOW_TRACKING_URI=server, KFP_RUN_ID="kfp-trains")
    tracking.open_pipeline("trains")
    with start(tracking, "done", "key-of-done") as run:
        run.log({"loss": 2.0}, 1)
    before = client.get_run(run.run_id)
    parent = tracking.pipeline_run().info.run_id
    tracking = step(environment, KFP_RUN_ID="kfp-reruns")
    tracking.open_pipeline("reruns")
    with start(tracking, "done", "key-of-done", step=1) as again:
        pass
    after = client.get_run(run.run_id)
    assert again.run_id == run.run_id and after.info.end_time == before.info.end_time
    assert after.data.tags == before.data.tags
    with start(tracking, "done", "key-of-done") as again:  # its checkpoints were lost
        again.log({"loss": 2.0}, 1)
        assert client.get_run(run.run_id).info.status == "RUNNING"
    assert (
        client.get_run(run.run_id).data.tags["mlflow.parentRunId"]
        == tracking.pipeline_run().info.run_id
        != parent
    )


def test_runs_that_nobody_ended_are_ended_when_the_next_pipeline_begins(
    server: str, environment: pytest.MonkeyPatch
) -> None:
    """MLflow was away when the exit handler ran, or the workflow was deleted with its exit
    handler."""
    client = mlflow.MlflowClient(server)
    tracking = step(environment, MLFLOW_TRACKING_URI=server)
    month, now = 30 * 24 * 3600 * 1000, int(time.time() * 1000)

    def create(age: int, tags: dict[str, str]) -> str:
        run = client.create_run(tracking.experiment_id, start_time=now - age, tags=tags)
        return str(run.info.run_id)

    pipeline = {"captioner.version": "1", "kfp.pipeline_run_id": "kfp-dead"}
    expected = {}
    for age, tags, status in (
        (month + 9999, pipeline, "FAILED"),
        (month - 9999, pipeline, "RUNNING"),
        (2 * month, {"kfp.pipeline_run_id": "of another program"}, "RUNNING"),
    ):
        run = create(age, tags)
        expected |= {run: status, create(0, {"mlflow.parentRunId": run}): status}
    expected[create(2 * month, {"captioner.version": "1"})] = "RUNNING"  # not of a pipeline
    step(environment, KFP_RUN_ID="kfp-next").open_pipeline("next")
    assert {run: client.get_run(run).info.status for run in expected} == expected


def test_nested_runs_carry_kubeflows_tags_and_the_parent_links_to_it(
    server: str, environment: pytest.MonkeyPatch, start: Callable[..., Run]
) -> None:
    client = mlflow.MlflowClient(server)
    address = "https://kfp.example.com/#/runs/details/kfp-tags"
    kfp = {"kfp.pipeline_run_id": "kfp-tags", "kfp.pipeline_run_url": address}
    kfp["kfp.pipeline_version_id"] = "v"
    tracking = step(environment, MLFLOW_TRACKING_URI=server, KFP_RUN_ID="kfp-tags")
    parent = client.create_run(tracking.experiment_id, run_name="theirs", tags=kfp).info.run_id
    tracking.open_pipeline("ours")
    with start(tracking, "one") as run:
        pass
    assert kfp.items() <= client.get_run(run.run_id).data.tags.items()
    assert tracking.pipeline_run().info.run_id == parent, (
        "a nested run with the same tags is not the parent"
    )
    link = f"[This run in Kubeflow Pipelines]({address})"
    assert client.get_run(parent).data.tags["mlflow.note.content"].strip() == link
    outcome = {"captioner.winner": "one", "captioner.nothing": ""}
    tracking.conclude({"val_CIDEr": 1.5}, outcome, "## Won")
    data = client.get_run(parent).data
    assert data.tags["mlflow.note.content"] == f"{link}\n\n## Won"
    assert data.metrics == {"val_CIDEr": 1.5}
    assert data.tags["captioner.winner"] == "one" and "captioner.nothing" not in data.tags


def test_a_run_that_the_server_made_for_the_step_is_the_candidates(
    server: str, environment: pytest.MonkeyPatch, start: Callable[..., Run]
) -> None:
    """Kubeflow Pipelines 2.17 with its MLflow plugin: parent and nested run are there before the
    step starts."""
    client = mlflow.MlflowClient(server)
    experiment = client.create_experiment("theirs")
    tags = {"kfp.pipeline_run_id": "kfp-2"}
    parent = client.create_run(experiment, run_name="run of captioner", tags=tags).info
    tags = {"mlflow.parentRunId": parent.run_id}
    own = client.create_run(experiment, run_name="train", tags=tags).info
    variables = {"MLFLOW_EXPERIMENT_ID": experiment, "MLFLOW_RUN_ID": own.run_id}
    tracking = step(environment, MLFLOW_TRACKING_URI=server, KFP_RUN_ID="kfp-2", **variables)
    tracking.open_pipeline("ours")
    assert tracking.pipeline_run().info.run_id == parent.run_id, "no second parent"
    with start(tracking, "five-captions", params={"epochs": 3}, tags={"a": "b"}) as run:
        run.log({"loss": 1.0}, 1)
    assert run.run_id == own.run_id
    ended = client.get_run(own.run_id)
    assert (ended.info.run_name, ended.info.status) == ("five-captions", "FINISHED")
    assert ended.data.params == {"epochs": "3"} and ended.data.tags["a"] == "b"
    assert ended.data.metrics == {"loss": 1.0} and len(client.search_runs([experiment])) == 2


def test_links_lead_where_people_see_mlflow(
    server: str, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ui = "https://mlflow.example.com"
    tracking = step(environment, MLFLOW_TRACKING_URI=server, MLFLOW_UI_URL=f"{ui}/")
    assert tracking.run_url("r") == f"{ui}/#/experiments/{tracking.experiment_id}/runs/r"
    environment.delenv("MLFLOW_UI_URL")
    environment.delenv("MLFLOW_EXPERIMENT_ID", raising=False)
    tracking = step(environment, MLFLOW_TRACKING_URI=empty_store(tmp_path))
    assert tracking.run_url("r") is None


@pytest.mark.parametrize(("uri", "folder"), [("", "work"), ("sqlite:///mine/mlflow.db", "mine")])
def test_the_embedded_store_is_the_same_wherever_a_step_runs(
    uri: str, folder: str, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environment.chdir(tmp_path)
    environment.setenv("MLFLOW_TRACKING_URI", uri)
    tracking = require_mlflow(tracking_from_environment("work"))
    assert tracking.uri == f"sqlite:///{tmp_path}/{folder}/mlflow.db"
    assert os.environ["MLFLOW_TRACKING_URI"] == tracking.uri
    assert (tmp_path / folder / "mlflow.db").exists()


def test_the_experiment_of_the_environment_and_a_deleted_one(
    environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracking = step(environment, MLFLOW_TRACKING_URI=uri, MLFLOW_EXPERIMENT_NAME="theirs")
    client = mlflow.MlflowClient(uri)
    assert client.get_experiment(tracking.experiment_id).name == "theirs"
    client.delete_experiment(tracking.experiment_id)
    number = tracking.experiment_id
    message = f"theirs is deleted; mlflow experiments restore --experiment-id {number} restores it"
    for variable, value in (("NAME", "theirs"), ("ID", number)):
        other = step(environment, **{f"MLFLOW_EXPERIMENT_{variable}": value})
        with pytest.raises(UserError, match=message):
            other.require_answer()


@pytest.mark.parametrize("uri", ["localhost:5000", "mlflow.example.com", "mlruns"])
def test_a_tracking_uri_without_a_scheme_is_refused(
    uri: str, environment: pytest.MonkeyPatch
) -> None:
    environment.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UserError, match=f"MLFLOW_TRACKING_URI {uri}: has no scheme; a server is"):
        tracking_from_environment()


def test_the_secrets_variables_give_way_to_the_servers() -> None:
    variables = {
        "CAPTIONER_MLFLOW_TRACKING_URI": "http://ours",
        "CAPTIONER_MLFLOW_UI_URL": "http://people",
        "MLFLOW_TRACKING_URI": "http://theirs",
    }
    adopt_secret(variables)
    assert variables["MLFLOW_TRACKING_URI"] == "http://theirs"
    assert variables["MLFLOW_UI_URL"] == "http://people"


def test_a_run_has_the_version_of_its_code_and_the_load_of_its_machine(
    server: str, environment: pytest.MonkeyPatch, start: Callable[..., Run]
) -> None:
    environment.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "1")
    tracking = step(environment, MLFLOW_TRACKING_URI=server)
    client, deadline = mlflow.MlflowClient(server), time.monotonic() + 120
    load = "system/cpu_utilization_percentage"
    with start(tracking, "alone", tags={"data": "d"}) as run:
        while load not in client.get_run(run.run_id).data.metrics:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    tags = client.get_run(run.run_id).data.tags
    assert tags["captioner.version"] == __version__ and tags["data"] == "d"
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    if head.returncode == 0:
        assert tags["mlflow.source.git.commit"].removesuffix("-dirty") == head.stdout.strip()
