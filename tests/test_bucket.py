"""The stages against a bucket: Google Cloud Storage as gcsfs speaks it, from an emulator on loopback."""

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from torch import Tensor

from model_lib import UserError
from model_lib.train.config import TrainConfig
from model_lib.train.learning import Learner
from model_lib.train.training import train
from tests.services import Faults, faulty_bucket, gcs_emulator

Run = Callable[..., CompletedProcess]
BUCKET = "gs://pictures"


@pytest.fixture()
def bucket(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[fsspec.AbstractFileSystem]:
    """A bucket with the scenes in it, for this process and those that it starts."""
    with gcs_emulator("pictures", tmp_path / "gcs") as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        fs = fsspec.filesystem("gs", skip_instance_cache=True)
        for file in sorted(scenes.rglob("*")):
            if file.is_file():
                fs.pipe_file(f"pictures/scenes/{file.relative_to(scenes)}", file.read_bytes())
        yield fs


def test_the_whole_way_in_a_bucket(captioner: Run, bucket: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    def run(*arguments: object) -> dict:
        done = captioner(*arguments, "--json", XDG_CACHE_HOME=str(tmp_path / "cache"))
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    made = run("ingest", "--dataset", f"{BUCKET}/scenes", "--output", f"{BUCKET}/data")
    assert made["counts"] == {"train": 64, "val": 12} and not made["quarantined"]
    options = ("--data", f"{BUCKET}/data", "--output", f"{BUCKET}/run", "--preset", "tiny")
    trained = run("train", *options, "--epochs", "2")
    assert trained["model"] == f"{BUCKET}/run/best" and trained["steps"] == 4
    kept = {Path(name).name for name in bucket.ls("pictures/run/checkpoints", detail=False)}
    assert kept == {"step-00000002-validated", "step-00000004-validated"}
    assert run("train", *options, "--epochs", "2") == trained, "the second call finds the first one's checkpoint"

    judged = run("evaluate", "--model", f"{BUCKET}/run/best", "--data", f"{BUCKET}/data", "--output", f"{BUCKET}/j")
    assert judged["pictures"] == 12 and bucket.exists("pictures/j/report.html")

    bucket.pipe_file("pictures/scenes/val2017/broken.jpg", b"no picture")
    options = (
        "--images",
        f"{BUCKET}/scenes/val2017",
        "--output",
        f"{BUCKET}/captions",
        "--model",
        f"{BUCKET}/run/best",
        "--shard_pictures",
        "5",
    )
    summary = run("batch", *options)
    assert (summary["pictures"], summary["ok"], summary["errors"]) == (13, 12, {"unreadable": 1})
    parts = sorted(bucket.glob("pictures/captions/*/captions/*.parquet"))
    rows = [row for part in parts for row in pq.ParquetFile(bucket.open(part)).read().to_pylist()]
    assert len(parts) == 3 and len(rows) == 13
    assert all(row["uri"].startswith(f"{BUCKET}/scenes/val2017/") for row in rows)

    bucket.rm_file(parts[1])
    written = bucket.info(parts[0])["generation"]
    again = run("batch", *options)
    assert {**again, "pictures_per_second": 0} == {**summary, "pictures_per_second": 0}
    assert bucket.info(parts[0])["generation"] == written, "what was there was not done again"


def test_a_bucket_that_is_not_there_is_one_line(captioner: Run, bucket: fsspec.AbstractFileSystem) -> None:
    done = captioner("ingest", "--dataset", "gs://elsewhere/set", "--output", f"{BUCKET}/out")
    assert done.returncode == 2 and "gs://elsewhere/set/annotations" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    done = captioner("ingest", "--dataset", f"{BUCKET}/scenes", "--output", "gs://elsewhere/out")
    assert done.returncode == 2 and "gs://elsewhere/out: cannot be written to" in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture()
def faults(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """A bucket with the data set in it, behind a proxy that lets a tenth of the requests fail."""
    sleep = asyncio.sleep
    quickly = SimpleNamespace(sleep=lambda seconds: sleep(seconds / 50))
    monkeypatch.setattr("gcsfs.retry.asyncio", quickly)  # its six attempts would take half a minute
    faults = Faults(0.0, seed=0)
    with faulty_bucket("pictures", tmp_path / "gcs", faults) as fs:
        fs.put(f"{data}/", "pictures/data/", recursive=True)
        faults.share = 0.1
        yield faults


def each_step(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], None]) -> None:
    """Do something before each step of training."""
    learn = Learner.learn

    def acting(learner: Learner, batch: np.ndarray, pixels: Tensor, step: int) -> dict:
        act(step)
        return learn(learner, batch, pixels, step)

    monkeypatch.setattr("model_lib.train.learning.Learner.learn", acting)


def test_training_outlasts_a_bucket_that_fails(
    faults: Faults, finished: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    each_step(monkeypatch, lambda step: faults.outage(4) if step == 3 else None)
    options = {"preset": "tiny", "epochs": 3, "checkpoint_steps": 1}
    train(TrainConfig(data=f"{BUCKET}/data", output=f"{BUCKET}/run", **options))
    assert faults.failed > 20 and ": fails (HttpError: out of order, 503); asking again" in caplog.text
    ours = fsspec.filesystem("gs").cat_file("pictures/run/best/model.safetensors")
    assert ours == (finished / "best" / "model.safetensors").read_bytes()


def test_a_shard_that_disappears_is_one_line(faults: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    fs = fsspec.filesystem("gs")

    def remove(step: int) -> None:
        if step == 2:
            fs.rm_file("pictures/data/train-00000.parquet")

    each_step(monkeypatch, remove)
    with pytest.raises(
        UserError, match=r"data/train-00000\.parquet: the manifest names this shard, but it is not there"
    ):
        train(TrainConfig(data=f"{BUCKET}/data", output=f"{BUCKET}/lost", preset="tiny", epochs=3))
    assert fs.exists("pictures/lost/checkpoints/step-00000002-validated/manifest.json")
