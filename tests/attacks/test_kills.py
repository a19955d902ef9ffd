"""SIGKILL at random moments of every stage, fifty of each: started again, it ends as undisturbed.

Deselected by default, as it takes minutes: make soak. So are the kills in a bucket, in
test_batch.py.
"""

import json
from pathlib import Path

import mlflow
import pytest

from model_lib.evaluate.config import EvaluateConfig
from model_lib.evaluate.evaluation import evaluate
from model_lib.registry.registry import MODEL
from tests.helpers.batches import captions_by_name, read_output
from tests.helpers.killed import killed
from tests.helpers.training import RECIPE, curves, same_best

KILLS = 50
pytestmark = pytest.mark.soak


def rounds(stage: str, options: dict, folder: Path, seed: int) -> list[Path]:
    """Kill a stage; return the outputs of the rounds."""
    kills = killed(stage, options, str(folder), seed, KILLS)
    assert sum(map(len, kills)) == KILLS
    in_a_save = sum(map(sum, kills))
    print(f"{stage}: {KILLS} kills, {in_a_save} of them while files were half-written")
    assert in_a_save >= KILLS // 5, "what a kill in a save leaves was not tried"
    return [folder / f"killed-{number}" for number in range(len(kills))]


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.name != ".lock"
    }


def test_ingest(scenes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    options = {"dataset": str(scenes), "shard_images": 8, "store": "original"}
    for output in rounds("ingest", options, folder, seed=1):
        ours, theirs = files(output), files(folder / "whole")
        assert ours.keys() == theirs.keys()
        assert all(ours[name] == theirs[name] for name in theirs if name != "manifest.json"), output
        manifests = [json.loads(tree["manifest.json"]) for tree in (ours, theirs)]
        assert manifests[0]["fingerprint"] == manifests[1]["fingerprint"]
        assert manifests[0]["shards"] == manifests[1]["shards"]


def test_train(data: Path, tmp_path: Path) -> None:
    options = {"data": str(data), "preset": "tiny", "epochs": 4, "batch_size": 8, **RECIPE}
    options |= {"validate_every": 5, "checkpoint_steps": 1, "log_steps": 1}
    outputs = rounds("train", options, tmp_path, seed=2)
    theirs = curves(tmp_path / "whole-store" / "mlflow.db")
    for output in outputs:
        ours = curves(Path(f"{output}-store", "mlflow.db"))
        assert ours == theirs
        assert {len(values) for metric in ours.values() for values in metric.values()} == {1}
        assert same_best(output, tmp_path / "whole") and not list(output.rglob(".part-*"))


def test_evaluate(data: Path, finished: Path, tmp_path: Path) -> None:
    options = {"model": str(finished / "best"), "data": str(data)}
    for output in rounds("evaluate", options, tmp_path, seed=3):
        ours, theirs = files(output), files(tmp_path / "whole")
        assert ours.keys() == theirs.keys()
        assert all(ours[name] == theirs[name] for name in ("results.json", "predictions.parquet"))
        scores = [json.loads(tree["scores.json"]) for tree in (ours, theirs)]
        assert scores[0] == scores[1] | {"images_per_second": scores[0]["images_per_second"]}


def test_register(data: Path, finished: Path, tmp_path: Path) -> None:
    evaluated = str(tmp_path / "evaluated")
    evaluate(EvaluateConfig(model=str(finished / "best"), data=str(data), output=evaluated))
    options = {"evaluations": evaluated}
    for output in rounds("register", options, tmp_path, seed=4):
        client = mlflow.MlflowClient(f"sqlite:///{output}-store/mlflow.db")
        champion = client.get_registered_model(MODEL).aliases["champion"]
        versions = client.search_model_versions(f"name='{MODEL}'")
        decisions = {str(version.version): version.tags["decision"] for version in versions}
        assert decisions == {str(champion): "champion"}, output
        assert (output / "decision.html").exists()


def test_batch(scenes: Path, saved_model: Path, tmp_path: Path) -> None:
    options = {"images": str(scenes / "train2017"), "model": str(saved_model), "shard_images": 4}
    for output in rounds("batch", options, tmp_path, seed=5):
        ours, theirs = (captions_by_name(read_output(o)) for o in (output, tmp_path / "whole"))
        assert ours == theirs and len(ours) == 64
