"""The stages against a bucket: Google Cloud Storage as gcsfs speaks it, from an emulator on loopback."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import fsspec
import pyarrow.parquet as pq
import pytest

from tests.services import gcs_emulator

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
    assert kept == {"step-00000002", "step-00000004"}
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
    parts = sorted(bucket.ls("pictures/captions/captions", detail=False))
    rows = [row for part in parts for row in pq.ParquetFile(bucket.open(part)).read().to_pylist()]
    assert len(parts) == 3 and len(rows) == 13
    assert all(row["uri"].startswith(f"{BUCKET}/scenes/val2017/") for row in rows)

    bucket.rm_file(parts[1])
    written = bucket.info(parts[0])["generation"]
    assert run("batch", *options) == summary
    assert bucket.info(parts[0])["generation"] == written, "what was there was not done again"


def test_a_bucket_that_is_not_there_is_one_line(captioner: Run, bucket: fsspec.AbstractFileSystem) -> None:
    done = captioner("ingest", "--dataset", "gs://elsewhere/set", "--output", f"{BUCKET}/out")
    assert done.returncode == 2 and "gs://elsewhere/set/annotations" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    done = captioner("ingest", "--dataset", f"{BUCKET}/scenes", "--output", "gs://elsewhere/out")
    assert done.returncode == 2 and "gs://elsewhere/out: cannot be written to" in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1
