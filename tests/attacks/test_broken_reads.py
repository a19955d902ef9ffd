"""A bucket whose answers break off: no row is lost or doubled, and none holds half an image."""

import random
import zipfile
from pathlib import Path

from model_lib.batch.batching import batch
from model_lib.ingest.image_source import open_image_source, open_list
from tests.helpers.batches import batch_config, captions_by_name, read_output, read_rows
from tests.helpers.ingests import ingested
from tests.helpers.services import Faults, faulty_bucket, put_folder


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
    here = ingested(tmp_path / "data", dataset=scenes, shard_images=8)
    options = {"model": saved_model, "shard_images": 8}
    expected = batch(batch_config(scenes / "train2017", tmp_path / "out", **options))
    faults = Faults(0.0, seed=0)
    with faulty_bucket("b", tmp_path / "gcs", faults) as fs:
        put_folder(fs, scenes, "b/in")
        faults.cut = 0.1
        there = ingested("gs://b/data", dataset="gs://b/in", shard_images=8)
        summary = batch(batch_config("gs://b/in/train2017", "gs://b/out", **options))
        faults.cut = 0.0
        rows = read_output("b/out", fs)
    assert faults.broken_off > 10
    assert (there.fingerprint, there.counts) == (here.fingerprint, here.counts)
    assert not there.quarantined
    assert (summary.images, summary.ok) == (expected.images, expected.ok) == (64, 64)
    assert captions_by_name(rows) == captions_by_name(read_rows(expected))
