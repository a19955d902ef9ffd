"""The whole training pipeline in a bucket of S3, its steps as processes: too long for every
change."""

from pathlib import Path

import pytest

from tests.helpers.batches import read_output
from tests.helpers.in_s3 import WORKFLOW, cloud

pytestmark = pytest.mark.containers
STEPS = {"ingest", "train", "evaluate", "evaluate-champion", "register", "caption", "merge"}


def test_every_step_of_training_works_in_s3_and_leaves_what_kubeflow_takes(
    scenes: Path, tmp_path: Path
) -> None:
    with cloud(scenes, tmp_path) as services:
        arguments = {
            "data": "s3://bucket/scenes",
            "output": "s3://bucket/out",
            "candidates": [{"name": "one"}],
            "preset": "tiny",
            "train_options": {"epochs": 1},
            "eval_options": {"num_beams": 1},
            "caption_images": "s3://bucket/scenes/val2017",
        }
        _, outputs = services.run("train_captioner", arguments)
        rows = read_output("bucket/out/captions", services.fs)
        expected = ("ok", "models:/captioner/1")
        assert [(row["status"], row["model"]) for row in rows] == [expected] * 12
        files = {Path(name).name for name in services.fs.find("bucket/mlflow")}
        assert "model.safetensors" in files
        assert services.runs() == {WORKFLOW: "FINISHED", "one": "FINISHED"}
        (post,) = services.notifications
        assert (post["state"], post["run"]) == ("SUCCEEDED", WORKFLOW)
    assert set(outputs) >= STEPS
    (model,) = outputs["train"].artifacts["model"].artifacts
    where = model.metadata["model"]
    assert where.startswith("s3://bucket/out/candidates/one-")
    assert Path(model.uri).read_text() == f"{where}\n"
    links = {"ingest": "dataset", "evaluate": "report", "register": "model", "merge": "summary"}
    for step, name in links.items():
        (artifact,) = outputs[step].artifacts[name].artifacts
        assert Path(artifact.uri).is_file(), f"{step}: the link to {name} leads nowhere"
