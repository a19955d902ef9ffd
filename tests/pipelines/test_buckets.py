"""A compiled pipeline as a scheduled run meets it: no name, everything in S3, MLflow's artifacts too.

Its outputs are what Kubeflow Pipelines takes, with MLflow and without.
"""

import json
import sys
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pyarrow.parquet as pq
import pytest
from kfp import components as kfp_components
from kfp import dsl

from components.evaluate.component import evaluate
from components.train.component import train
from model_lib.data.shards import read_manifest
from model_lib.steps.artifacts import set_metadata
from model_lib.steps.candidates import configure_candidates
from pipelines.local import run_locally
from pipelines.submit import COMPILED
from tests.pipelines.kfp_server import take_output
from tests.services import mlflow_server, store, webhook

KINDS = {"model": dsl.Model, "metrics": dsl.Metrics, "report": dsl.HTML}
WORKFLOW = "nightly-x7k2p-1-3056141721"


def scheduled(name: str) -> Any:
    """Return a compiled pipeline with the name that a scheduled run has: none."""
    text = (COMPILED / f"{name}.yaml").read_text()
    assert "constant: '{{$.pipeline_job_name}}'" in text
    return kfp_components.load_component_from_text(text.replace("'{{$.pipeline_job_name}}'", "''"))


def test_all_steps_work_in_s3_and_leave_what_kubeflow_takes(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        store("s3", "bucket", tmp_path / "s3") as fs,
        mlflow_server(tmp_path / "mlflow", artifacts="s3://bucket/mlflow") as server,
        webhook() as (address, told),
    ):
        variables = {"CAPTIONER_MLFLOW_TRACKING_URI": server, "WEBHOOK_URL": address, "KFP_RUN_ID": str(uuid.uuid4())}
        variables |= {"KFP_WORKFLOW": WORKFLOW, "XDG_CACHE_HOME": str(tmp_path / "cache")}
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID"):
            monkeypatch.delenv(name, raising=False)
        for file in sorted(scenes.rglob("*")):
            if file.is_file():
                fs.pipe_file(f"bucket/scenes/{file.relative_to(scenes)}", file.read_bytes())
        arguments = {
            "data_dataset": "s3://bucket/scenes",
            "data_output": "s3://bucket/data",
            "train_checkpoint_uri": "s3://bucket/candidates",
            "train_candidates": [{"name": "one"}],
            "train_preset": "tiny",
            "train_epochs": 1,
            "eval_num_beams": 1,
            "caption_images": "s3://bucket/scenes/val2017",
            "caption_output": "s3://bucket/captions",
        }
        root = run_locally(scheduled("train_captioner"), arguments, tmp_path, "subprocess")
        (part,) = fs.glob("bucket/captions/*/captions/*.parquet")
        rows = pq.ParquetFile(fs.open(part)).read().to_pylist()
        assert [row["status"] for row in rows] == ["ok"] * 12
        assert {row["model"] for row in rows} == {"models:/captioner/1"}
        assert any(name.endswith("/model.safetensors") for name in fs.find("bucket/mlflow"))

        client = mlflow.MlflowClient(server)
        runs = client.search_runs([client.get_experiment_by_name("captioner").experiment_id])
        status = {run.info.run_name: run.info.status for run in runs}
        assert status == {WORKFLOW: "FINISHED", "one": "FINISHED"}
    assert [(post["state"], post["run"]) for post in told] == [("SUCCEEDED", WORKFLOW)]

    outputs = {
        file.parent.name: take_output(file.read_text(), str(root)) for file in root.rglob("executor_output.json")
    }
    assert set(outputs) >= {
        "ingest",
        "candidates",
        "train",
        "evaluate",
        "judge",
        "register",
        "plan",
        "caption",
        "merge",
    }
    (model,) = outputs["train"].artifacts["model"].artifacts
    place = model.metadata["model"]
    assert place.startswith("s3://bucket/candidates/one-") and Path(model.uri).read_text() == f"{place}\n"
    for step, name in (("ingest", "data"), ("evaluate", "report"), ("register", "model"), ("merge", "summary")):
        (artifact,) = outputs[step].artifacts[name].artifacts
        assert Path(artifact.uri).is_file(), f"{step}: the link to {name} leads nowhere"


def test_without_mlflow_training_and_evaluation_leave_what_kubeflow_takes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the other steps, those that write artifacts have nothing of MLflow in them, or need it."""
    monkeypatch.setitem(sys.modules, "mlflow", None)  # as if it were not installed
    candidates = [{"name": "one", "epochs": 1}]
    (candidate,) = configure_candidates(
        str(data), read_manifest(str(data)).fingerprint, str(tmp_path), "", candidates, preset="tiny"
    )
    root = tmp_path / "root"
    artifacts = {name: kind(uri=str(root / name)) for name, kind in KINDS.items()}
    for artifact in artifacts.values():
        artifact.path = artifact.uri
    train.python_func(candidate, artifacts["model"])
    evaluate.python_func(candidate, 1, 4, "", artifacts["metrics"], artifacts["report"])
    left = {
        name: {"artifacts": [{"name": name, "uri": artifact.uri, "metadata": artifact.metadata}]}
        for name, artifact in artifacts.items()
    }
    taken = take_output(json.dumps({"artifacts": left}), str(root)).artifacts
    model, metrics = taken["model"].artifacts[0].metadata, taken["metrics"].artifacts[0].metadata
    assert model["steps"] == 2 and "run_id" not in model and metrics["CIDEr"] >= 0


def test_what_kubeflow_refuses_is_left_out_of_metadata() -> None:
    artifact = SimpleNamespace(metadata={})
    nan, infinity = float("nan"), float("inf")
    set_metadata(artifact, a=1, b=None, c=nan, d={"e": -infinity, "f": [None, 2.5, (nan, "x")]}, g=False)
    assert artifact.metadata == {"a": 1, "d": {"f": [2.5, ["x"]]}, "g": False}


@pytest.mark.parametrize(
    ("uri", "metadata", "reason"),
    [
        ("/root/a", '{"score": NaN}', "invalid value NaN"),
        ("/root/a", '{"run_id": null}', "NullValue"),
        ("gs://bucket/best", "{}", "does not have expected bucket prefix"),
    ],
)
def test_the_stand_in_refuses_what_kubeflow_does(uri: str, metadata: str, reason: str) -> None:
    """The strictness of the tests above."""
    text = f'{{"artifacts": {{"a": {{"artifacts": [{{"name": "a", "uri": "{uri}", "metadata": {metadata}}}]}}}}}}'
    with pytest.raises(ValueError, match=reason):
        take_output(text, "/root")
