"""A bucket whose answers break off: no row is lost or doubled, and none holds half an image."""

import asyncio
import random
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from model_lib.batch.batching import batch
from model_lib.batch.config import BatchConfig
from model_lib.ingest.config import IngestConfig
from model_lib.ingest.image_source import open_image_source, open_list
from model_lib.ingest.ingesting import ingest
from tests.helpers.services import Faults, faulty_bucket


@pytest.fixture(autouse=True)
def driver_that_fails_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's own attempts would take most of the tests."""
    sleep = asyncio.sleep
    quickly = SimpleNamespace(sleep=lambda seconds: sleep(seconds / 50))
    monkeypatch.setattr("gcsfs.retry.asyncio", quickly)


def test_an_archive_in_a_bucket_that_is_down_for_a_while_is_asked_for_again(tmp_path: Path) -> None:
    rng = random.Random(0)
    # Larger than what is read ahead.
    content = {f"val2017/{name}": rng.randbytes(9_000_000) for name in "abc"}
    with zipfile.ZipFile(tmp_path / "val2017.zip", "w") as archive:
        for name, image in content.items():
            archive.writestr(name, image)
    faults = Faults(0.0, seed=0)
    with faulty_bucket("b", tmp_path / "gcs", faults) as fs:
        fs.pipe_file("b/val2017.zip", (tmp_path / "val2017.zip").read_bytes())
        faults.outage(1)
        source = open_image_source("gs://b/val2017.zip")
        down = faults.failed
        faults.outage(1)
        assert source.read("a") == content["val2017/a"]
        again = faults.failed
        faults.outage(1)
        with open_list("zip://val2017/b::gs://b/val2017.zip") as file:
            assert file.read() == content["val2017/b"]
        assert 6 < down < again < faults.failed, "the driver alone would have given up"


def test_answers_that_break_off_are_asked_for_again(
    scenes: Path, saved_model: Path, tmp_path: Path
) -> None:
    here = ingest(IngestConfig(dataset=str(scenes), output=str(tmp_path / "data"), shard_mb=1))
    local = {
        "images": str(scenes / "train2017"),
        "output": str(tmp_path / "out"),
        "model": str(saved_model),
    }
    expected = batch(BatchConfig(**local, shard_images=8))
    faults = Faults(0.0, seed=0)
    with faulty_bucket("b", tmp_path / "gcs", faults) as fs:
        for file in sorted(scenes.rglob("*")):
            if file.is_file():
                fs.pipe_file(f"b/in/{file.relative_to(scenes)}", file.read_bytes())
        faults.cut = 0.1
        there = ingest(IngestConfig(dataset="gs://b/in", output="gs://b/data", shard_mb=1))
        remote = {
            "images": "gs://b/in/train2017",
            "output": "gs://b/out",
            "model": str(saved_model),
        }
        remote_summary = batch(BatchConfig(**remote, shard_images=8))
        faults.cut = 0.0
        files = fs.glob("b/out/*/captions/*.parquet")
        rows = [row for file in files for row in pq.ParquetFile(fs.open(file)).read().to_pylist()]
    assert faults.broken_off > 10
    assert (
        there.fingerprint == here.fingerprint
        and there.counts == here.counts
        and not there.quarantined
    )
    assert (remote_summary.images, remote_summary.ok) == (expected.images, expected.ok) == (64, 64)
    captions = {Path(row["uri"]).name: row["caption"] for row in rows}
    parts = (tmp_path / "out").glob("*/captions/*.parquet")
    ours = {
        Path(row["uri"]).name: row["caption"]
        for file in parts
        for row in pq.read_table(file).to_pylist()
    }
    assert len(rows) == 64 and captions == ours
