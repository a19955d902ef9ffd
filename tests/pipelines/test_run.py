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
from model_lib.errors import UserError
from model_lib.io.locks import output_lock
from model_lib.registry.config import RegisterConfig
from model_lib.registry.registry import register
from model_lib.steps.form import candidate_configs
from model_lib.tracking.server import require_mlflow, tracking_from_environment
from pipelines.run import RunConfig, are_small, data_of, images_of
from tests.conftest import zipped
from tests.helpers.coco_files import write_captions
from tests.helpers.evaluations import write_evaluation
from tests.helpers.kfp_server import take_output
from tests.helpers.services import empty_store

Run = Callable[..., CompletedProcess]
RUN = ("run", "--workdir", "work", "--scenes", "48", "--num_beams", "1")
CANDIDATES = json.dumps([{"name": "slow", "learning_rate": 1e-6}, {"name": "fast"}])


@pytest.fixture(autouse=True)
def embedded_tracking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def in_mlflow(work: Path, store: str, candidates: list[str]) -> None:
    """Check that each candidate is under a run, finished and evaluated, and that the files are in
    the folder."""
    client = mlflow.MlflowClient(store)
    experiment = client.get_experiment_by_name("captioner")
    assert experiment.artifact_location == f"{work}/mlartifacts"
    runs = client.search_runs([experiment.experiment_id])
    parents = {run.info.run_id for run in runs if "mlflow.parentRunId" not in run.data.tags}
    nested = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert sorted(str(run.info.run_name) for run in nested) == candidates
    assert {run.data.tags["mlflow.parentRunId"] for run in nested} <= parents
    assert all(run.info.status == "FINISHED" and "val_CIDEr" in run.data.metrics for run in nested)


def test_from_scenes_to_captions_by_the_better_of_winner_and_champion(
    captioner: Run, saved_model: Path, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    empty_store(work)
    evaluation = write_evaluation(tmp_path, 0.1, "untrained", model=saved_model)
    tracking = require_mlflow(tracking_from_environment(str(work)))
    register(RegisterConfig(evaluations=(evaluation,)), tracking)

    # Several candidates: make soak, make test-containers.
    done = captioner(*RUN, "--epochs=2", "--candidates", '[{"name": "fast"}]')
    assert done.returncode == 0, done.stderr
    for step in ("ingest", "train", "evaluate", "register", "caption"):
        assert f"step {step}" in done.stderr, done.stderr
    lines = ["Images      48 to train on, 48 to evaluate on; quarantined: none"]
    lines += ["Winner      fast, version 2, is the champion now:", "Captions    48 of 48 images"]
    words = [
        "CIDEr shuffled",
        "fast has CIDEr",
        "the champion 0.0",
        "Report",
        "Parquet",
        "mlflow ui",
    ]
    for text in (*lines, *words):
        assert text in done.stdout, done.stdout
    model = Captioner.from_pretrained(str(work / "best"))
    assert model.training_record["name"] == "fast"
    assert generate_caption(model, work / "scenes" / "val2017" / "000000000001.jpg") is not None
    in_mlflow(work, tracking.uri, ["fast"])
    outputs = list(work.glob("pipeline/**/executor_output.json"))
    assert len(outputs) > 8
    for file in outputs:
        take_output(file.read_text(), str(work / "pipeline"))


@pytest.mark.soak
@pytest.mark.usefixtures("java")
def test_a_first_run_makes_a_champion_and_a_second_with_a_broken_image_keeps_it(
    captioner: Run, tmp_path: Path
) -> None:
    first = captioner(*RUN, "--epochs=2", "--candidates", CANDIDATES)
    assert first.returncode == 0 and "version 1, is the champion now:" in first.stdout, first.stderr

    drawn = tmp_path / "work" / "scenes"
    archives = tmp_path / "set"  # as captioner download leaves it
    (drawn / "train2017" / "000000000007.jpg").write_bytes(b"broken")
    archives.mkdir()
    zipped(archives / "annotations_trainval2017.zip", drawn, "annotations")
    for split in ("train2017", "val2017"):
        zipped(archives / f"{split}.zip", drawn, split)
    slow = '[{"name": "slow", "learning_rate": 1e-6}]'
    second = captioner(*RUN, "--dataset=set", "--epochs=1", "--json", "--candidates", slow)
    assert second.returncode == 0, second.stderr
    summary = json.loads(second.stdout)
    assert summary["quarantined"] == {"unreadable": 1}
    assert summary["images"] == {"train": 47, "val": 48}
    registered = summary["registered"]
    assert registered["version"] == "2" and registered["champion_version"] == "1"
    assert not registered["promoted"] and "needed more" in registered["reason"]
    assert [row["name"] for row in registered["candidates"]] == ["slow"]
    assert summary["captioned"]["images"] == summary["captioned"]["ok"] == 48
    assert pq.read_table(summary["captioned"]["captions"]).num_rows == 48
    assert len(summary["examples"]) == 3 and Path(summary["report"]).is_file()
    in_mlflow(tmp_path / "work", summary["tracking_uri"], ["fast", "slow", "slow"])


def test_a_second_run_in_a_working_directory_is_refused_and_leaves_the_firsts_log(
    captioner: Run, tmp_path: Path
) -> None:
    with output_lock(str(tmp_path / "work")):
        (tmp_path / "work" / "pipeline.log").write_text("of the first")
        done = captioner("run", "--workdir", "work", "--scenes", "2")
    assert done.returncode == 1 and "work: another run is at work there" in done.stderr
    assert (tmp_path / "work" / "pipeline.log").read_text() == "of the first"
    assert not (tmp_path / "work" / "scenes").exists()


def test_the_images_captioned_at_the_end_are_cocos_images_of_or_all(
    archives: Path, scenes: Path, tmp_path: Path
) -> None:
    assert images_of(str(archives)) == str(archives / "val2017.zip")
    assert images_of(str(scenes)) == str(scenes / "val2017")
    shutil.copytree(scenes / "val2017", tmp_path / "images")
    assert images_of(str(tmp_path)) == str(tmp_path)
    (tmp_path / "list.txt").write_text("images/000000000001.jpg")
    assert images_of(str(tmp_path / "list.txt")) == str(tmp_path / "list.txt")
    assert images_of(f"{tmp_path}/*.tar") == ""


def test_only_small_candidates_are_trained_side_by_side() -> None:
    two = [{"name": "a"}, {"name": "b"}]
    assert are_small(candidate_configs(two, "tiny", {}))
    large = {"vision": "openai/clip-vit-large-patch14", "decoder": "openai-community/gpt2"}
    for candidates, preset in (
        (two, "clip-l-gpt2-medium"),
        ([*two, {"name": "c", "preset": "clip-l-gpt2-medium"}], "tiny"),
        ([*two, {"name": "c", "preset": "clip-l-gpt2-medium", **large}], "tiny"),
        ([*two, {"name": "c", "init_from": "models:/captioner@champion"}], "tiny"),
    ):
        assert not are_small(candidate_configs(candidates, preset, {}))


def test_a_run_takes_what_ingest_takes(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(scenes)
    lists = {
        "train": "annotations/captions_train2017.json",
        "val": "annotations/captions_val2017.json",
        "images": "train2017",
    }
    config = RunConfig(ingest_options=json.dumps({**lists, "shortest_side": 64}))
    absolute = {name: str(scenes / path) for name, path in lists.items()}
    assert data_of(config, tmp_path) == ("", {**absolute, "shortest_side": 64})
    assert not list(tmp_path.iterdir()), "scenes are drawn only where there is no data"
    for options, problem in (
        ("{", "ingest_options: is not JSON"),
        ("[]", "ingest_options: is not a JSON object"),
        ('{"annotations": "gone.csv"}', "gone.csv: not there"),
        ('{"annotation": "gone.csv"}', "ingest_options: unknown option 'annotation'"),
    ):
        with pytest.raises(UserError, match=problem):
            data_of(RunConfig(ingest_options=options), tmp_path)


def test_a_data_set_without_a_usable_image_is_refused_in_one_line(
    captioner: Run, tmp_path: Path
) -> None:
    empty_store(tmp_path / "work")
    annotations = tmp_path / "set" / "annotations"
    annotations.mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (tmp_path / "set" / split).mkdir()
        (tmp_path / "set" / split / "a.jpg").write_bytes(b"no image")
        write_captions(annotations / f"captions_{split}.json", [(1, "a.jpg")])
    done = captioner("run", "--dataset", "set", "--workdir", "work")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("captioner: error: ") and "no usable image" in last
    log = (tmp_path / "work" / "pipeline.log").read_text()
    assert "captioner: error: " in log and "Traceback" not in log
