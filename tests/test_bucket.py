"""Every command against a bucket on loopback: Google Cloud Storage by gcsfs, S3 by s3fs."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any, NamedTuple

import fsspec
import pytest

from model_lib import UserError
from model_lib.io.storage import version
from model_lib.train.config import TrainConfig
from model_lib.train.training import train
from tests.helpers.batches import read_output
from tests.helpers.services import STORES, Faults, empty_store, faulty_bucket, put_folder, store
from tests.helpers.steps import before_steps

Run = Callable[..., CompletedProcess]
BUCKET = "gs://images"


class Bucket(NamedTuple):
    uri: str
    fs: fsspec.AbstractFileSystem


@pytest.fixture(params=STORES)
def bucket(request: pytest.FixtureRequest, scenes: Path, tmp_path: Path) -> Iterator[Bucket]:
    """A bucket with the scenes in it, for this process and those that it starts."""
    with store(request.param, "images", tmp_path / request.param) as fs:
        put_folder(fs, scenes, "images/scenes")
        yield Bucket(f"{request.param}://images", fs)


def test_every_command_works_in_a_bucket(captioner: Run, bucket: Bucket, tmp_path: Path) -> None:
    uri, fs = bucket
    variables = {
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "MLFLOW_TRACKING_URI": empty_store(tmp_path),
    }

    def run(*arguments: object) -> Any:
        process = captioner(*arguments, "--json", **variables)
        assert process.returncode == 0, process.stderr
        return json.loads(process.stdout)

    run("scenes", "--output", f"{uri}/drawn", "--train", "2", "--val", "2")
    assert len(fs.ls("images/drawn/train2017")) == 2
    manifest = run("ingest", "--dataset", f"{uri}/scenes", "--output", f"{uri}/data")
    assert manifest["counts"] == {"train": 64, "val": 12} and not manifest["quarantined"]
    data, model = f"{uri}/data", f"{uri}/run/best"
    options = ("--data", data, "--output", f"{uri}/run", "--preset", "tiny", "--epochs", "2")
    trained = run("train", *options)
    assert trained["model"] == model and trained["steps"] == 4
    checkpoints = {Path(name).name for name in fs.ls("images/run/checkpoints", detail=False)}
    assert checkpoints == {"step-00000002-validated", "step-00000004-validated"}
    assert run("train", *options) == trained, "the second run resumes from the first one's end"

    evaluated = run("evaluate", "--model", model, "--data", data, "--output", f"{uri}/j")
    assert evaluated["images"] == 12 and fs.exists("images/j/report.html")
    annotations = f"{uri}/scenes/annotations/captions_val2017.json"
    options = ("--results", f"{uri}/j/results.json", "--annotations", annotations)
    assert run("score", *options)["images"] == 12
    assert run("register", "--evaluations", f"{uri}/j")["promoted"]
    assert fs.exists("images/j/decision.html")
    assert [version["aliases"] for version in run("models")] == [["champion"]]
    image = f"{uri}/scenes/val2017/000000000001.jpg"
    by_folder = run("caption", "-f", image, "--model", model)
    by_registry = run("caption", "-f", image, "--model", "models:/captioner@champion")
    assert by_folder == by_registry and by_folder[0]["caption"]

    fs.pipe_file("images/scenes/val2017/broken.jpg", b"no image")
    fs.pipe_file("images/scenes/val2017/empty.jpg", b"")
    options = ("--images", f"{uri}/scenes/val2017", "--output", f"{uri}/captions")
    options += ("--model", model, "--shard_images", "5")
    summary = run("batch", *options)
    assert (summary["images"], summary["ok"]) == (14, 12)
    assert summary["errors"] == {"unreadable": 1, "empty": 1}
    parts = sorted(fs.glob("images/captions/*/captions/*.parquet"))
    rows = read_output("images/captions", fs)
    assert len(parts) == 3 and len(rows) == 14
    assert all(row["uri"].startswith(f"{uri}/scenes/val2017/") for row in rows)

    fs.rm_file(parts[1])
    written = version(fs.info(parts[0]))
    again = run("batch", *options)
    assert {**again, "images_per_second": 0} == {**summary, "images_per_second": 0}
    assert version(fs.info(parts[0])) == written, "the other shards are not captioned again"


def test_a_bucket_that_is_not_there_is_one_line(captioner: Run, bucket: Bucket) -> None:
    missing = f"{bucket.uri.partition(':')[0]}://elsewhere"
    for dataset, output, message in (
        (f"{missing}/set", f"{bucket.uri}/out", f"{missing}/set: not there"),
        (f"{bucket.uri}/scenes", f"{missing}/out", f"{missing}/out: cannot be written to"),
    ):
        process = captioner("ingest", "--dataset", dataset, "--output", output)
        assert process.returncode == 2 and message in process.stderr, process.stderr
        assert len(process.stderr.splitlines()) == 1


@pytest.fixture()
def faults(data: Path, tmp_path: Path) -> Iterator[Faults]:
    """A bucket with the data set in it, behind a proxy that lets a tenth of the requests fail."""
    faults = Faults(0.0, seed=0)
    with faulty_bucket("images", tmp_path / "gcs", faults) as fs:
        fs.put(f"{data}/", "images/data/", recursive=True)
        faults.share = 0.1
        yield faults


def test_training_outlasts_a_bucket_that_fails(
    faults: Faults,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    before_steps(monkeypatch, lambda step: faults.outage(4) if step == 3 else None)
    options = {"preset": "tiny", "epochs": 3, "checkpoint_steps": 1}
    train(TrainConfig(data=f"{BUCKET}/data", output=f"{BUCKET}/run", **options))
    assert faults.failed > 20
    assert ": fails (HttpError: out of order, 503); next attempt in" in caplog.text
    ours = fsspec.filesystem("gs").cat_file("images/run/best/model.safetensors")
    assert ours == (finished / "best" / "model.safetensors").read_bytes()


def test_a_shard_that_disappears_is_one_line(
    faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs = fsspec.filesystem("gs")

    def remove(step: int) -> None:
        if step == 2:
            fs.rm_file("images/data/train-00000.parquet")

    before_steps(monkeypatch, remove)
    with pytest.raises(UserError, match=r"data/train-00000\.parquet: (no such file|the manifest)"):
        train(TrainConfig(data=f"{BUCKET}/data", output=f"{BUCKET}/lost", preset="tiny", epochs=3))
    assert fs.exists("images/lost/checkpoints/step-00000002-validated/manifest.json")
