"""A pipeline run ends in MLflow and notifies a webhook, each once: by its last step, or by the exit
handler."""

from collections.abc import Iterator

import mlflow
import pytest

from model_lib.steps.closing import close_pipeline, finish_pipeline
from model_lib.steps.kfp_runs import run_state
from model_lib.tracking.server import MlflowTracking
from tests.helpers.kfp_server import KfpServer
from tests.helpers.services import free_port, mlflow_server, webhook
from tests.helpers.tracked import step


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as address:
        yield address


@pytest.fixture()
def posts(environment: pytest.MonkeyPatch) -> Iterator[list[dict]]:
    """What was posted to the webhook in the environment."""
    with webhook() as (address, posts):
        environment.setenv("WEBHOOK_URL", address)
        yield posts


def outcome(server: str, tracking: MlflowTracking) -> str:
    return str(mlflow.MlflowClient(server).get_run(tracking.pipeline_run().info.run_id).info.status)


@pytest.mark.parametrize("succeeds", [True, False])
def test_the_last_step_ends_a_run_and_the_exit_handler_what_did_not_get_there(
    server: str, environment: pytest.MonkeyPatch, posts: list[dict], succeeds: bool
) -> None:
    run_id = f"kfp-3-{succeeds}"
    tracking = step(environment, MLFLOW_TRACKING_URI=server, KFP_RUN_ID=run_id)
    tracking.open_pipeline("nightly")
    if succeeds:
        finish_pipeline("nightly")
        finish_pipeline("nightly")  # by a pod in place of one that was lost
        assert outcome(server, tracking) == "FINISHED" and len(posts) == 1
    close_pipeline("nightly", "RUNNING")
    (post,) = posts
    state, status = ("SUCCEEDED", "FINISHED") if succeeds else ("FAILED", "FAILED")
    assert (post["state"], post["run"], outcome(server, tracking)) == (state, "nightly", status)
    assert post["text"].startswith(f"captioner: nightly {state.lower()} (http")
    assert post["mlflow"] in post["text"]


def test_a_retry_that_succeeds_ends_the_run_well_although_it_was_closed_as_failed(
    server: str, environment: pytest.MonkeyPatch, posts: list[dict]
) -> None:
    """Kubeflow Pipelines' Retry runs what failed, and the exit handler not a second time."""
    tracking = step(environment, MLFLOW_TRACKING_URI=server, KFP_RUN_ID="kfp-retried")
    tracking.open_pipeline("nightly")
    close_pipeline("nightly", "RUNNING")
    assert outcome(server, tracking) == "FAILED"
    finish_pipeline("nightly")
    assert outcome(server, tracking) == "FINISHED"
    assert [post["state"] for post in posts] == ["FAILED", "SUCCEEDED"]


def test_a_webhook_that_was_away_at_the_last_step_is_notified_by_the_exit_handler(
    server: str, environment: pytest.MonkeyPatch
) -> None:
    environment.setattr("model_lib.steps.closing.time.sleep", lambda seconds: None)
    environment.setenv("WEBHOOK_URL", f"http://127.0.0.1:{free_port()}")
    tracking = step(environment, MLFLOW_TRACKING_URI=server, KFP_RUN_ID="kfp-unheard")
    tracking.open_pipeline("nightly")
    finish_pipeline("nightly")
    with webhook() as (address, posts):
        environment.setenv("WEBHOOK_URL", address)
        close_pipeline("nightly", "RUNNING")
        close_pipeline("nightly", "RUNNING")
        assert [post["state"] for post in posts] == ["SUCCEEDED"]


def test_the_next_run_ends_those_that_kubeflow_knows_to_be_over(
    server: str, environment: pytest.MonkeyPatch
) -> None:
    """After a Retry that failed again, or where Argo gave the workflow up, nothing else ends
    them."""
    client = mlflow.MlflowClient(server)
    tracking = step(environment, MLFLOW_TRACKING_URI=server)
    states = {"SUCCEEDED": "FINISHED", "FAILED": "FAILED", "CANCELED": "KILLED"}
    states |= {"RUNNING": "RUNNING", "elsewhere": "RUNNING"}
    runs = {}
    with KfpServer() as kfp:
        for state in states:
            tags = {"captioner.version": "1", "kfp.pipeline_run_id": f"kfp-{state}"}
            runs[state] = client.create_run(tracking.experiment_id, tags=tags).info.run_id
            if state != "elsewhere":  # another cluster's, in the same MLflow
                kfp.runs[f"kfp-{state}"] = {"runtime_config": {}, "state": state}
        tags = {"captioner.version": "1", "kfp.pipeline_run_id": "kfp-FAILED"}
        tags["mlflow.parentRunId"] = runs["FAILED"]
        nested = client.create_run(tracking.experiment_id, tags=tags).info.run_id
        client.set_terminated(runs["FAILED"], "FAILED")  # by the exit handler, before the Retry
        host, port = kfp.host.removeprefix("http://").split(":")
        environment.setenv("ML_PIPELINE_SERVICE_HOST", host)
        environment.setenv("ML_PIPELINE_SERVICE_PORT", port)
        step(environment, KFP_RUN_ID="kfp-after").open_pipeline("after", run_state)
    assert {state: client.get_run(run).info.status for state, run in runs.items()} == states
    assert client.get_run(nested).info.status == "FAILED", "a candidate that a Retry went on with"


def test_a_kubeflow_that_does_not_answer_is_asked_once(
    server: str, environment: pytest.MonkeyPatch
) -> None:
    tracking = step(environment, MLFLOW_TRACKING_URI=server, KFP_RUN_ID="kfp-now")
    client = mlflow.MlflowClient(server)
    runs = []
    for number in range(3):
        tags = {"captioner.version": "1", "kfp.pipeline_run_id": f"kfp-before-{number}"}
        runs.append(client.create_run(tracking.experiment_id, tags=tags).info.run_id)
    questions = []

    def no_answer(run_id: str) -> str:
        questions.append(run_id)
        raise TimeoutError

    tracking.open_pipeline("now", no_answer)
    assert len(questions) == 1
    assert {client.get_run(run).info.status for run in runs} == {"RUNNING"}


def test_a_run_that_never_began_has_failed(
    server: str, environment: pytest.MonkeyPatch, posts: list[dict]
) -> None:
    step(environment, MLFLOW_TRACKING_URI=server, KFP_RUN_ID="kfp-never")
    close_pipeline("nightly", "RUNNING")
    assert posts[0]["text"] == "captioner: nightly failed"


def test_where_mlflow_has_no_run_a_success_is_posted_once(
    server: str, environment: pytest.MonkeyPatch, posts: list[dict]
) -> None:
    """Without a server each step has a store of its own, in its pod."""
    step(environment, MLFLOW_TRACKING_URI=server, KFP_RUN_ID="kfp-alone")
    finish_pipeline("nightly")
    close_pipeline("nightly", "COMPLETE")
    assert [post["state"] for post in posts] == ["SUCCEEDED"]


def test_with_mlflow_away_the_webhook_gets_what_is_known(
    environment: pytest.MonkeyPatch, posts: list[dict], caplog: pytest.LogCaptureFixture
) -> None:
    environment.setenv("MLFLOW_TRACKING_URI", f"http://user:s3cret@127.0.0.1:{free_port()}")
    environment.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    environment.setenv("KFP_RUN_ID", "kfp-away")
    close_pipeline("nightly", "RUNNING")
    close_pipeline("nightly", "COMPLETE")
    (post,) = posts
    assert post["state"] == "UNKNOWN" and "MLflow does not say how" in post["text"]
    assert "MLflow's runs were not ended" in caplog.text and "s3cret" not in caplog.text


@pytest.mark.parametrize(
    "address",
    ["http://127.0.0.1:9/s3cret", "http://127.0.0.1:s3cret/", "s3cret://x", "http://[s3cret"],
)
def test_a_webhook_that_is_away_or_invalid_is_tried_again_and_never_logged(
    address: str, environment: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    environment.setattr("model_lib.steps.closing.time.sleep", lambda seconds: None)
    environment.setenv("WEBHOOK_URL", address)
    environment.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    environment.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    close_pipeline("nightly", "FAILED")
    assert "attempt 3" in caplog.text and "s3cret" not in caplog.text
