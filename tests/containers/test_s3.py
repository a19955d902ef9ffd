"""The whole training pipeline in a bucket of S3, its steps as processes: too long for every
change."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.helpers.in_s3 import WORKFLOW, cloud

pytestmark = pytest.mark.containers
STEPS = {
    "ingest",
    "candidates",
    "train",
    "evaluate",
    "evaluate-champion",
    "register",
    "plan",
    "caption",
    "merge",
}


def test_every_step_of_training_works_in_s3_and_leaves_what_kubeflow_takes(
    scenes: Path, tmp_path: Path
) -> None:
    with cloud(scenes, tmp_path) as services:
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
        _, outputs = services.run("train_captioner", arguments)
        (part,) = services.fs.glob("bucket/captions/*/captions/*.parquet")
        rows = pq.ParquetFile(services.fs.open(part)).read().to_pylist()
        assert [(row["status"], row["model"]) for row in rows] == [
            ("ok", "models:/captioner/1")
        ] * 12
        assert any(
            name.endswith("/model.safetensors") for name in services.fs.find("bucket/mlflow")
        )
        assert services.runs() == {WORKFLOW: "FINISHED", "one": "FINISHED"}
        assert [(post["state"], post["run"]) for post in services.notifications] == [
            ("SUCCEEDED", WORKFLOW)
        ]
    assert set(outputs) >= STEPS
    (model,) = outputs["train"].artifacts["model"].artifacts
    where = model.metadata["model"]
    assert (
        where.startswith("s3://bucket/candidates/one-")
        and Path(model.uri).read_text() == f"{where}\n"
    )
    for step, name in (
        ("ingest", "data"),
        ("evaluate", "report"),
        ("register", "model"),
        ("merge", "summary"),
    ):
        (artifact,) = outputs[step].artifacts[name].artifacts
        assert Path(artifact.uri).is_file(), f"{step}: the link to {name} leads nowhere"
