"""The whole training pipeline through kfp.local, on a very small setting."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import mlflow
import pyarrow.parquet as pq
import pytest

from model_lib import Captioner, generate_caption
from tests.conftest import WITHOUT_JAVA

Run = Callable[..., CompletedProcess]
CANDIDATES = json.dumps([{"name": "slow", "learning_rate": 1e-6}, {"name": "fast"}])


@pytest.fixture(autouse=True)
def embedded_tracking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.mark.usefixtures("java")
def test_from_scenes_to_captions_and_once_more_with_a_broken_picture(captioner: Run, tmp_path: Path) -> None:
    command = ("run", "--workdir", "work", "--scenes", "48", "--epochs", "2", "--num_beams", "1")
    first = captioner(*command, "--candidates", CANDIDATES)
    assert first.returncode == 0, first.stderr
    for word in ("step ingest", "step train", "step evaluate", "step register", "step caption", "48 scenes"):
        assert word in first.stderr, word
    for word in (
        "Pictures    48 to learn from, 48 to judge on; quarantined: none",
        "slow",
        "fast",
        "CIDEr shuffled",
        "Winner",
        "version 1",
        "Report",
        "Parquet",
        "mlflow ui",
    ):
        assert word in first.stdout, word

    model = Captioner.from_pretrained(str(tmp_path / "work" / "best"))
    assert model.training_record["name"] in ("slow", "fast")
    assert generate_caption(model, tmp_path / "work" / "scenes" / "val2017" / "000000000001.jpg") is not None

    shutil.copytree(tmp_path / "work" / "scenes", tmp_path / "set")
    (tmp_path / "set" / "train2017" / "000000000007.jpg").write_bytes(b"broken")
    again = ("run", "--workdir", "work", "--dataset", "set", "--epochs", "1", "--num_beams", "1", "--json")
    candidates = ("--candidates", '[{"name": "slow", "learning_rate": 1e-6}]')
    second = captioner(*again, *candidates, PATH=WITHOUT_JAVA)  # which METEOR was started with for the first
    assert second.returncode == 0, second.stderr
    summary = json.loads(second.stdout)
    assert summary["quarantined"] == {"unreadable": 1} and summary["pictures"] == {"train": 47, "val": 48}
    registered = summary["registered"]
    assert registered["version"] == "2" and not registered["promoted"] and registered["champion_version"] == "1"
    assert [row["name"] for row in registered["candidates"]] == ["slow"] and "needed more" in registered["reason"]
    assert summary["captioned"]["pictures"] == summary["captioned"]["ok"] == 48
    assert pq.read_table(summary["captioned"]["captions"]).num_rows == 48
    assert len(summary["examples"]) == 3 and Path(summary["report"]).is_file()

    client = mlflow.MlflowClient(summary["tracking_uri"])
    experiment = client.get_experiment_by_name("captioner")
    assert experiment.artifact_location == f"{tmp_path}/work/mlartifacts"
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    nested = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert len(parents) == 2 and sorted(run.info.run_name for run in nested) == ["fast", "slow", "slow"]
    assert {run.data.tags["mlflow.parentRunId"] for run in nested} <= {run.info.run_id for run in parents}
    assert all(run.info.status == "FINISHED" for run in nested)
    assert ["val_METEOR" in run.data.metrics for run in nested] == [False, True, True], "the newest is first"


def test_a_data_set_without_a_usable_picture_is_refused_in_one_line(captioner: Run, tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / "set" / f"{split}2017").mkdir(parents=True)
        (tmp_path / "set" / f"{split}2017" / "a.jpg").write_bytes(b"no picture")
        document = {
            "images": [{"id": 1, "file_name": "a.jpg"}],
            "annotations": [{"id": 1, "image_id": 1, "caption": "a scene"}],
        }
        (tmp_path / "set" / "annotations").mkdir(exist_ok=True)
        (tmp_path / "set" / "annotations" / f"captions_{split}2017.json").write_text(json.dumps(document))
    done = captioner("run", "--dataset", "set", "--workdir", "work")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("captioner: error: ") and "no usable picture" in done.stderr
    assert "UserError" in (tmp_path / "work" / "pipeline.log").read_text()
