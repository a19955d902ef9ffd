"""Both pipelines on a Kubeflow Pipelines server that the user names: `make test-cluster KFP=…`.

Results are read through the server's API and MLflow. In order: what ends soonest comes first.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model_lib import __version__
from model_lib.io import storage
from tests.cluster.conftest import (
    VAL_IMAGES,
    Cluster,
    say,
    variable,
    wait_until,
)
from tests.helpers.batches import read_output

pytestmark = pytest.mark.cluster
ENDS = ("SUCCEEDED", "FAILED", "CANCELED")
MISSING = "/there/is/no/such/folder"
WORKERS = 2
Runs = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def refused(cluster: Cluster) -> dict[str, Any]:
    """Runs of both pipelines that the first step must refuse."""
    say("both pipelines with a folder of images that is not there")
    own = {"output": "/tmp/captioner-test"}
    missing = {"train_captioner": {"data": MISSING}, "caption_bucket": {"images": MISSING}}
    return {
        pipeline: cluster.submit(pipeline, "--wait", **own, **parameters)
        for pipeline, parameters in missing.items()
    }


@pytest.mark.parametrize("pipeline", ["train_captioner", "caption_bucket"])
def test_the_pipeline_is_uploaded_as_a_version_named_after_its_content(
    cluster: Cluster, refused: dict[str, Any], compiled: Path, pipeline: str
) -> None:
    content = (compiled / f"{pipeline}.yaml").read_bytes()
    version = f"{__version__}-{hashlib.sha256(content).hexdigest()[:12]}"
    pipeline_id = cluster.client.get_pipeline_id(pipeline.replace("_", "-"))
    versions = cluster.client.list_pipeline_versions(pipeline_id, page_size=100).pipeline_versions
    assert version in [row.display_name for row in versions]
    assert refused[pipeline]["version"] == version


@pytest.mark.parametrize("pipeline", ["train_captioner", "caption_bucket"])
def test_a_run_without_its_images_fails_in_preflight_and_says_why(
    refused: dict[str, Any], pipeline: str
) -> None:
    document = refused[pipeline]
    assert document["state"] == "FAILED"
    assert "Preflight" in document["error"] and MISSING in document["error"], document["error"]


def test_training_succeeds(trained: dict[str, Any]) -> None:
    assert trained["state"] == "SUCCEEDED", trained["error"]


def test_mlflow_has_the_candidate_with_its_scores_data_and_model(
    trained: dict[str, Any], mlflow_runs: Runs
) -> None:
    runs = mlflow_runs(trained["run_id"])
    assert runs.keys() == {"", "small"}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert all("val_CIDEr" in run.data.metrics for run in runs.values())
    contexts = {row.tags[0].value for row in runs["small"].inputs.dataset_inputs}
    assert contexts == {"training", "evaluation"} and runs["small"].outputs.model_outputs
    assert runs[""].data.tags["captioner.winner"] == "small"


def skipped(cluster: Cluster, run_id: str) -> set[str]:
    """Return the tasks that the server did not run, of those that run a container."""
    names = ("executor", "train", "evaluate")
    tasks = cluster.tasks(run_id)
    return {t.task_id for t in tasks if t.state == "SKIPPED" and t.display_name in names}


def test_the_same_run_again_takes_training_and_evaluation_from_the_cache(
    cluster: Cluster, trained: dict[str, Any], training: dict[str, Any]
) -> None:
    assert trained["state"] == "SUCCEEDED", "there is nothing in the cache"
    say("the same run again")
    again = cluster.submit("train_captioner", "--wait", **training)
    assert again["state"] == "SUCCEEDED", again["error"]
    before, after = (len(skipped(cluster, run["run_id"])) for run in (trained, again))
    assert after >= before + 2, f"{after} of its steps were skipped, and {before} of the first run"


@pytest.fixture(scope="module")
def captioning(folder: str, trained: dict[str, Any]) -> dict[str, Any]:
    """The parameters for captioning with the trained model, which need not be the champion."""
    assert trained["state"] == "SUCCEEDED", "there is no model"
    filesystem, path = storage.filesystem(folder)
    (model,) = filesystem.glob(f"{path}/work/**/best")
    return {
        "model": storage.join(folder, model.partition(path)[2].strip("/")),
        "images": storage.join(folder, "scenes", "val2017"),
        "output": storage.join(folder, "captions"),
        "caption_options": {"shard_images": 1, "num_beams": 1},
        "caption_workers": WORKERS,
    }


@pytest.fixture(scope="module")
def captioned(cluster: Cluster, captioning: dict[str, Any]) -> dict[str, Any]:
    say(f"caption_bucket, {VAL_IMAGES} shards and {WORKERS} workers")
    return cluster.submit("caption_bucket", "--wait", **captioning)


def test_a_few_workers_caption_every_image_of_many_shards(
    captioned: dict[str, Any], captioning: dict[str, Any]
) -> None:
    assert captioned["state"] == "SUCCEEDED", captioned["error"]
    filesystem, path = storage.filesystem(captioning["output"])
    rows = read_output(path, filesystem)
    assert len({row["uri"] for row in rows}) == len(rows) == VAL_IMAGES
    assert {row["status"] for row in rows} == {"ok"}


def test_a_terminated_run_leaves_nothing_open(
    cluster: Cluster, training: dict[str, Any], mlflow_runs: Runs
) -> None:
    say("train_captioner, to be terminated")
    training = {**training, "output": f"{training['output']}-terminated"}
    training["train_options"] = {"epochs": 1000}
    run_id = cluster.submit("train_captioner", **training)["run_id"]

    def is_training() -> bool | None:
        runs = mlflow_runs(run_id)
        assert cluster.client.get_run(run_id).state not in ENDS, "it ended before it trained"
        return True if {"", "small"} <= runs.keys() else None

    wait_until("it trains", is_training)
    cluster.client.terminate_run(run_id)
    wait_until("it is terminated", lambda: cluster.client.get_run(run_id).state in ENDS or None)
    assert cluster.client.get_run(run_id).state != "SUCCEEDED"

    def closed() -> dict[str, str] | None:
        states = {name: run.info.status for name, run in mlflow_runs(run_id).items()}
        return None if "RUNNING" in states.values() else states

    assert wait_until("Close has ended its runs in MLflow", closed)[""] == "FAILED"


def test_a_recurring_run_fires(cluster: Cluster) -> None:
    own = {"images": MISSING, "output": "/tmp/captioner-test"}
    name = f"{cluster.session}-recurring"
    options = ("--name", name, "--every", "60")
    recurring = cluster.schedule("caption_bucket", *options, **own)["recurring_run_id"]
    experiment = cluster.client.get_experiment(experiment_name=cluster.session).experiment_id

    def fired() -> str | None:
        runs = cluster.client.list_runs(experiment_id=experiment, page_size=100).runs or []
        return next((run.run_id for run in runs if run.recurring_run_id == recurring), None)

    try:
        run_id = wait_until("a recurring run fires", fired)
    finally:
        cluster.client.delete_recurring_run(recurring)
    wait_until("that run ends", lambda: cluster.client.get_run(run_id).state in ENDS or None)


def test_two_machines_train_one_candidate(
    cluster: Cluster, training: dict[str, Any], mlflow_runs: Runs
) -> None:
    nodes = int(variable("NODES", "KFP=… NODES=2"))
    say(f"train_captioner on {nodes} machines")
    training = {**training, "output": f"{training['output']}-machines", "train_nodes": nodes}
    document = cluster.submit("train_captioner", "--wait", **training)
    assert document["state"] == "SUCCEEDED", document["error"]
    assert "val_CIDEr" in mlflow_runs(document["run_id"])["small"].data.metrics
