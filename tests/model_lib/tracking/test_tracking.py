"""A pipeline's runs in MLflow: one parent, a nested run for each candidate, closed whatever
happens."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import mlflow
import pytest

from model_lib import __version__
from model_lib.tracking.metrics import read_curves
from model_lib.tracking.runs import Run
from model_lib.tracking.server import (
    adopt_secret,
    require_mlflow,
    tracking_from_environment,
)
from tests.helpers.services import mlflow_server, postgres_programs, postgres_server
from tests.helpers.tracked import step


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


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Where a training writes its metrics."""
    (tmp_path / "training").mkdir()
    return str(tmp_path / "training")


def test_candidates_are_nested_under_the_pipelines_run(
    server: str, environment: pytest.MonkeyPatch, folder: str
) -> None:
    tracking = step(environment, MLFLOW_TRACKING_URI=server, KFP_RUN_ID="kfp-1")
    tracking.open_pipeline("train-captioner 1")
    tracking.open_pipeline("train-captioner 1")  # a retry
    with tracking.start("one", None, params={"epochs": 3}, tags={"a": "b"}, folder=folder) as one:
        one.log({"loss": 1.0}, 1)
    left_open = tracking.start("two", None, params={}, tags={}, folder=folder)

    client = mlflow.MlflowClient(server)
    parent = tracking.parent()
    runs = {run.info.run_name: run for run in client.search_runs([tracking.experiment_id])}
    assert (
        set(runs) == {"train-captioner 1", "one", "two"}
        and runs["train-captioner 1"].info.run_id == parent
    )
    assert {runs[name].data.tags["mlflow.parentRunId"] for name in ("one", "two")} == {parent}

    assert (
        tracking.close_pipeline(succeeded=True)
        == f"{server}/#/experiments/{tracking.experiment_id}/runs/{parent}"
    )
    status = {
        run.info.run_name: run.info.status for run in client.search_runs([tracking.experiment_id])
    }
    assert status == {"train-captioner 1": "FINISHED", "one": "FINISHED", "two": "FAILED"}
    assert left_open.run_id is not None


def test_curves_are_read_as_the_last_try_logged_them(folder: str) -> None:
    with Run(folder) as run:
        run.log({"train_loss": 3.0, "gradient_norm": 1.0}, 10)
        run.log({"train_loss": 2.0, "val_loss": 2.5}, 20)
    with Path(folder, "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "tim')  # killed while it wrote
    with Run(folder, step=10) as run:
        run.log({"train_loss": 1.5}, 20)
    assert read_curves(f"{folder}/best") == {
        "gradient_norm": [(10, 1.0)],
        "train_loss": [(10, 3.0), (20, 1.5)],
    }
    assert read_curves(f"{folder}/other/best") == {}


def test_nested_runs_are_closed_however_many_pages_they_fill(
    server: str, environment: pytest.MonkeyPatch, folder: str
) -> None:
    environment.setattr("model_lib.tracking.server.PAGE", 2)
    tracking = step(environment, MLFLOW_TRACKING_URI=server, KFP_RUN_ID="kfp-many")
    tracking.open_pipeline("many")
    runs = [
        str(tracking.start(f"candidate-{n}", None, params={}, tags={}, folder=folder).run_id)
        for n in range(7)
    ]
    client = mlflow.MlflowClient(server)
    client.set_terminated(runs[0])
    tracking.close_pipeline(succeeded=False)
    assert [client.get_run(run).info.status for run in runs] == ["FINISHED", *["FAILED"] * 6]
    assert client.get_run(tracking.parent()).info.status == "FAILED"


KILLED = """
import os, signal, sys, time
import model_lib.tracking.mlflow_run
from model_lib.tracking.server import tracking_from_environment
model_lib.tracking.mlflow_run.INTERVAL = 0.05
folder, step = sys.argv[1], int(sys.argv[2])
with tracking_from_environment().start(
    "killed", "key-of-killed", {"epochs": 3}, {}, folder, step
) as run:
    run.log({"loss": 2.0}, step + 1)
    while run.metrics.read(run.cursor):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_candidate_goes_on_in_a_retry_and_in_another_pipeline_run(
    server: str, environment: pytest.MonkeyPatch, folder: str
) -> None:
    client = mlflow.MlflowClient(server)

    def killed(at: int) -> str:
        """Let a process start or go on with the candidate at a step, and die after the next one;
        return its run."""
        command = [sys.executable, "-c", KILLED, folder, str(at)]
        done = subprocess.run(command, env=dict(os.environ), timeout=120)
        assert done.returncode == -signal.SIGKILL
        (run,) = client.search_runs(
            [tracking.experiment_id], "tags.`captioner.run` = 'key-of-killed'"
        )
        assert run.info.status == "RUNNING", "nobody could end it"
        return str(run.info.run_id)

    tracking = step(environment, MLFLOW_TRACKING_URI=server, KFP_RUN_ID="kfp-first")
    tracking.open_pipeline("first")
    first = tracking.parent()
    run_id = killed(at=0)
    assert killed(at=1) == run_id, "a retry goes on in the same run"
    tracking.close_pipeline(succeeded=False)
    assert client.get_run(run_id).info.status == "FAILED"

    tracking = step(environment, KFP_RUN_ID="kfp-second")
    tracking.open_pipeline("second")
    assert killed(at=2) == run_id
    tracking.close_pipeline(succeeded=False)
    assert client.get_run(run_id).info.status == "FAILED", (
        "it is closed with the pipeline run that went on with it"
    )
    with tracking.start("killed", "key-of-killed", {"epochs": 3}, {}, folder, step=3) as run:
        assert client.get_run(run_id).info.status == "RUNNING"
        run.log({"loss": 1.0}, 4)
    found = client.get_run(run_id)
    assert (
        run.run_id == run_id
        and found.info.status == "FINISHED"
        and found.data.params == {"epochs": "3"}
    )
    assert found.data.tags["mlflow.parentRunId"] == tracking.parent() != first
    assert found.data.tags["kfp.pipeline_run_id"] == "kfp-second"
    # Each start sent the whole file, and MLflow has each point once.
    points = [(point.step, point.value) for point in client.get_metric_history(run_id, "loss")]
    assert sorted(points) == [(1, 2.0), (2, 2.0), (3, 2.0), (4, 1.0)]


def test_a_finished_candidate_stays_with_the_pipeline_run_that_trained_it(
    server: str, environment: pytest.MonkeyPatch, folder: str
) -> None:
    client = mlflow.MlflowClient(server)
    tracking = step(environment, MLFLOW_TRACKING_URI=server, KFP_RUN_ID="kfp-trains")
    tracking.open_pipeline("trains")
    with tracking.start("done", "key-of-done", {}, {}, folder=folder) as run:
        run.log({"loss": 2.0}, 1)
    before = client.get_run(run.run_id)
    parent = tracking.parent()
    tracking = step(environment, KFP_RUN_ID="kfp-reruns")
    tracking.open_pipeline("reruns")
    with tracking.start("done", "key-of-done", {}, {}, folder=folder) as again:
        pass
    after = client.get_run(run.run_id)
    assert (again.run_id, after.info.end_time) == (
        run.run_id,
        before.info.end_time,
    ) and after.data.tags == before.data.tags
    # Its checkpoints were lost: it trains again.
    with tracking.start("done", "key-of-done", {}, {}, folder=folder) as again:
        again.log({"loss": 2.0}, 1)
        assert client.get_run(run.run_id).info.status == "RUNNING"
    assert client.get_run(run.run_id).data.tags["mlflow.parentRunId"] == tracking.parent() != parent


def test_runs_that_nobody_ended_are_ended_when_the_next_pipeline_begins(
    server: str, environment: pytest.MonkeyPatch
) -> None:
    """MLflow was away when the exit handler ran, or the workflow was deleted with its exit
    handler."""
    client = mlflow.MlflowClient(server)
    tracking = step(environment, MLFLOW_TRACKING_URI=server)
    month = 30 * 24 * 3600 * 1000
    ours = {"captioner.version": "1", "kfp.pipeline_run_id": "kfp-dead"}
    begun = {
        "dead": (ours, month + 9999),
        "alive": (ours, month - 9999),
        "theirs": ({"kfp.pipeline_run_id": "x"}, month * 2),
    }
    now = int(time.time() * 1000)
    runs = {
        name: client.create_run(
            tracking.experiment_id, start_time=now - age, run_name=name, tags=tags
        ).info.run_id
        for name, (tags, age) in begun.items()
    }
    nested = {
        name: client.create_run(
            tracking.experiment_id, tags={"mlflow.parentRunId": runs[name]}
        ).info.run_id
        for name in runs
    }
    alone = client.create_run(
        tracking.experiment_id, start_time=now - 2 * month, tags={"captioner.version": "1"}
    )
    step(environment, KFP_RUN_ID="kfp-next").open_pipeline("next")

    def status(run_id: str) -> str:
        return str(client.get_run(run_id).info.status)

    assert {
        name: status(run) for name, run in runs.items() if status(nested[name]) == status(run)
    } == {
        "dead": "FAILED",
        "alive": "RUNNING",
        "theirs": "RUNNING",
    }
    assert status(alone.info.run_id) == "RUNNING"


def test_nested_runs_carry_kubeflows_tags_and_the_parent_links_to_it(
    server: str, environment: pytest.MonkeyPatch, folder: str
) -> None:
    client = mlflow.MlflowClient(server)
    address = "https://kfp.example.com/#/runs/details/kfp-tags"
    kfp = {
        "kfp.pipeline_run_id": "kfp-tags",
        "kfp.pipeline_run_url": address,
        "kfp.pipeline_id": "p",
        "kfp.pipeline_version_id": "v",
    }
    tracking = step(environment, MLFLOW_TRACKING_URI=server, KFP_RUN_ID="kfp-tags")
    parent = client.create_run(tracking.experiment_id, run_name="theirs", tags=kfp).info.run_id
    tracking.open_pipeline("ours")
    with tracking.start("one", None, {}, {}, folder=folder) as run:
        pass
    assert kfp.items() <= client.get_run(run.run_id).data.tags.items()
    assert tracking.parent() == parent, "a nested run with the same tags is not the parent"
    link = f"[This run in Kubeflow Pipelines]({address})"
    assert client.get_run(parent).data.tags["mlflow.note.content"].strip() == link
    tracking.conclude(
        {"val_CIDEr": 1.5}, {"captioner.winner": "one", "captioner.nothing": ""}, "## Won"
    )
    found = client.get_run(parent).data
    assert found.tags["mlflow.note.content"] == f"{link}\n\n## Won" and found.metrics == {
        "val_CIDEr": 1.5
    }
    assert found.tags["captioner.winner"] == "one" and "captioner.nothing" not in found.tags


def test_a_run_that_the_server_made_for_the_step_is_the_candidates(
    server: str, environment: pytest.MonkeyPatch, folder: str
) -> None:
    """Kubeflow Pipelines 2.17 with its MLflow plugin: parent and nested run are there before the
    step starts."""
    client = mlflow.MlflowClient(server)
    experiment = client.create_experiment("theirs")
    parent = client.create_run(
        experiment, run_name="run of captioner", tags={"kfp.pipeline_run_id": "kfp-2"}
    ).info
    own = client.create_run(
        experiment, run_name="train", tags={"mlflow.parentRunId": parent.run_id}
    ).info
    given = {"MLFLOW_EXPERIMENT_ID": experiment, "MLFLOW_RUN_ID": own.run_id, "KFP_RUN_ID": "kfp-2"}
    tracking = step(environment, MLFLOW_TRACKING_URI=server, **given)
    tracking.open_pipeline("ours")
    assert tracking.parent() == parent.run_id, "no second parent"
    with tracking.start(
        "five-captions", None, params={"epochs": 3}, tags={"a": "b"}, folder=folder
    ) as run:
        run.log({"loss": 1.0}, 1)
    assert run.run_id == own.run_id
    found = client.get_run(own.run_id)
    assert found.info.run_name == "five-captions" and found.info.status == "FINISHED"
    assert (
        found.data.params == {"epochs": "3"}
        and found.data.tags["a"] == "b"
        and found.data.metrics == {"loss": 1.0}
    )
    assert len(client.search_runs([experiment])) == 2


def test_links_lead_where_people_see_mlflow(
    server: str, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tracking = step(
        environment, MLFLOW_TRACKING_URI=server, MLFLOW_UI_URL="https://mlflow.example.com/"
    )
    assert (
        tracking.run_url("r")
        == f"https://mlflow.example.com/#/experiments/{tracking.experiment_id}/runs/r"
    )
    environment.delenv("MLFLOW_UI_URL")
    environment.delenv("MLFLOW_EXPERIMENT_ID", raising=False)
    assert (
        step(environment, MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/mlflow.db").run_url("r")
        is None
    )


@pytest.mark.parametrize(("given", "place"), [("", "work"), ("sqlite:///mine/mlflow.db", "mine")])
def test_the_embedded_store_is_the_same_wherever_a_step_runs(
    given: str, place: str, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environment.chdir(tmp_path)
    environment.setenv("MLFLOW_TRACKING_URI", given)
    tracking = require_mlflow(tracking_from_environment("work"))
    assert (
        tracking.uri
        == os.environ["MLFLOW_TRACKING_URI"]
        == f"sqlite:///{tmp_path}/{place}/mlflow.db"
    )
    assert (tmp_path / place / "mlflow.db").exists()


def test_the_secrets_variables_give_way_to_the_servers() -> None:
    variables = {
        "CAPTIONER_MLFLOW_TRACKING_URI": "http://ours",
        "CAPTIONER_MLFLOW_UI_URL": "http://people",
        "MLFLOW_TRACKING_URI": "http://theirs",
    }
    adopt_secret(variables)
    assert (variables["MLFLOW_TRACKING_URI"], variables["MLFLOW_UI_URL"]) == (
        "http://theirs",
        "http://people",
    )


def test_a_run_knows_its_code_and_its_machine(
    server: str, environment: pytest.MonkeyPatch, folder: str
) -> None:
    environment.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "1")
    tracking = step(environment, MLFLOW_TRACKING_URI=server)
    client, deadline = mlflow.MlflowClient(server), time.monotonic() + 120
    with tracking.start("alone", None, params={}, tags={"data": "d"}, folder=folder) as run:
        while (
            "system/cpu_utilization_percentage" not in client.get_run(str(run.run_id)).data.metrics
        ):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    found = client.get_run(str(run.run_id))
    assert found.data.tags["captioner.version"] == __version__ and found.data.tags["data"] == "d"
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    if head.returncode == 0:
        commit = found.data.tags["mlflow.source.git.commit"]
        assert commit.removesuffix("-dirty") == head.stdout.strip()
