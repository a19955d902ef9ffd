"""Captioning in a bucket of S3 by a run without a name; and what steps leave is what Kubeflow
Pipelines takes.

Training in S3: tests/containers/test_s3.py.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from kfp import dsl

from components.evaluate.component import evaluate
from components.train.component import train
from model_lib.data.shards import read_manifest
from model_lib.steps.artifacts import set_metadata
from model_lib.steps.candidates import configure_candidates
from model_lib.steps.form import candidate_configs
from tests.helpers.batches import read_output
from tests.helpers.in_s3 import WORKFLOW, cloud
from tests.helpers.kfp_server import take_output

KINDS = {"model": dsl.Model, "metrics": dsl.Metrics, "report": dsl.HTML}


def test_a_bucket_of_s3_is_captioned_by_a_scheduled_run(
    scenes: Path, saved_model: Path, tmp_path: Path
) -> None:
    with cloud(scenes, tmp_path) as services:
        services.fs.put(f"{saved_model}/", "bucket/model/", recursive=True)
        names = {"images": "scenes/val2017", "output": "captions", "model": "model"}
        arguments = {name: f"s3://bucket/{path}" for name, path in names.items()}
        _, outputs = services.run("caption_bucket", arguments)
        rows = read_output("bucket/captions", services.fs)
        assert [row["status"] for row in rows] == ["ok"] * 12
        assert services.runs() == {WORKFLOW: "FINISHED"}
        (post,) = services.notifications
        assert (post["state"], post["run"]) == ("SUCCEEDED", WORKFLOW)
    assert set(outputs) >= {"plan", "caption", "merge"}
    (summary,) = outputs["merge"].artifacts["summary"].artifacts
    assert Path(summary.uri).is_file()


def test_without_mlflow_training_and_evaluation_leave_what_kubeflow_takes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the other steps, those that write artifacts have nothing of MLflow in them, or need it."""
    monkeypatch.setitem(sys.modules, "mlflow", None)  # as if it were not installed
    configs = candidate_configs([{"name": "one", "epochs": 1}], "tiny", {})
    fingerprint = read_manifest(str(data)).fingerprint
    (candidate,) = configure_candidates(configs, str(data), fingerprint, str(tmp_path))
    root = tmp_path / "root"
    artifacts = {name: kind(uri=str(root / name)) for name, kind in KINDS.items()}
    for artifact in artifacts.values():
        artifact.path = artifact.uri
    train.python_func(candidate, artifacts["model"])
    options = {"num_beams": 1, "limit": 4}
    evaluate.python_func(candidate, options, artifacts["metrics"], artifacts["report"])
    left = {
        name: {"artifacts": [{"name": name, "uri": artifact.uri, "metadata": artifact.metadata}]}
        for name, artifact in artifacts.items()
    }
    kept = take_output(json.dumps({"artifacts": left}), str(root)).artifacts
    model, metrics = kept["model"].artifacts[0].metadata, kept["metrics"].artifacts[0].metadata
    assert model["steps"] == 2 and "run_id" not in model and metrics["CIDEr"] >= 0


def test_what_kubeflow_refuses_is_left_out_of_metadata() -> None:
    artifact = SimpleNamespace(metadata={})
    nan, infinity = float("nan"), float("inf")
    nested = {"e": -infinity, "f": [None, 2.5, (nan, "x")]}
    set_metadata(artifact, a=1, b=None, c=nan, d=nested, g=False)
    assert artifact.metadata == {"a": 1, "d": {"f": [2.5, ["x"]]}, "g": False}


@pytest.mark.parametrize(
    ("uri", "metadata", "reason"),
    [
        ("/root/a", '{"score": NaN}', "invalid value NaN"),
        ("/root/a", '{"run_id": null}', "NullValue"),
        ("gs://bucket/best", "{}", "does not have expected bucket prefix"),
    ],
)
def test_take_output_refuses_what_kubeflow_does(uri: str, metadata: str, reason: str) -> None:
    """The strictness of the tests above."""
    artifact = f'{{"name": "a", "uri": "{uri}", "metadata": {metadata}}}'
    text = f'{{"artifacts": {{"a": {{"artifacts": [{artifact}]}}}}}}'
    with pytest.raises(ValueError, match=reason):
        take_output(text, "/root")
