"""A bucket whose listings are out of date, and what a process remembers of them: nothing is lost,
done twice or taken for finished."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt

from model_lib.batch.batching import batch
from model_lib.batch.merging import Summary
from model_lib.errors import WorkError
from model_lib.evaluate.config import EvaluateConfig
from model_lib.evaluate.evaluation import evaluate
from model_lib.io import storage
from model_lib.model.config import DecodeConfig
from model_lib.train.training import train
from tests.helpers.batches import batch_config, read_output
from tests.helpers.ingests import ingested
from tests.helpers.services import Faults, faulty_bucket, put_folder
from tests.helpers.training import interrupt_at, train_config

AGE = 5.0
"""Seconds that a listing is behind."""
Bucket = tuple[fsspec.AbstractFileSystem, Faults]


@pytest.fixture()
def bucket(scenes: Path, tmp_path: Path) -> Iterator[Bucket]:
    """A bucket with the scenes."""
    faults = Faults(0.0, seed=0)
    with faulty_bucket("b", tmp_path / "gcs", faults) as fs:
        put_folder(fs, scenes, "b/in")
        yield fs, faults


def caption(model: Path) -> Summary:
    return batch(batch_config("gs://b/in/val2017", "gs://b/out", model, shard_images=4))


def captioned(fs: fsspec.AbstractFileSystem) -> list[str]:
    fs.invalidate_cache()
    return [row["uri"] for row in read_output("b/out", fs)]


def test_what_others_add_and_remove_meanwhile_is_seen(
    bucket: Bucket, saved_model: Path, scenes: Path
) -> None:
    """A driver of a store remembers listings for as long as its process lives."""
    _, faults = bucket
    assert caption(saved_model).images == 12 and len(storage.list_names("gs://b/in/val2017")) == 12
    others = fsspec.filesystem("gs", skip_instance_cache=True)
    others.pipe_file("b/in/val2017/new.jpg", (scenes / "val2017" / "000000000001.jpg").read_bytes())
    others.rm_file("b/in/val2017/000000000002.jpg")
    assert "new.jpg" in storage.list_names("gs://b/in/val2017")
    assert caption(saved_model).images == 12
    uris = captioned(others)
    assert len(uris) == len(set(uris)) == 12
    assert "gs://b/in/val2017/new.jpg" in uris and "gs://b/in/val2017/000000000002.jpg" not in uris
    assert not faults.outdated


def test_captions_are_whole_though_listings_are_old(bucket: Bucket, saved_model: Path) -> None:
    fs, faults = bucket
    faults.stale = AGE
    for _ in range(2):
        summary = caption(saved_model)
        assert (summary.images, summary.ok) == (12, 12)
    faults.stale = 0.0
    assert faults.outdated and len(captioned(fs)) == 12


def test_a_model_is_trained_and_evaluated_though_listings_are_old(
    bucket: Bucket, data: Path, finished: Path, tmp_path: Path
) -> None:
    _, faults = bucket
    faults.stale = AGE
    ingested("gs://b/data", dataset="gs://b/in")
    config = train_config("gs://b/data", "gs://b/run", epochs=3, checkpoint_steps=1)
    interrupt_at(4, config)
    # A listing that hides its own checkpoints lets it start before them; it stops when it meets
    # them, and a retry goes on from them.
    for attempt in Retrying(retry=retry_if_exception_type(WorkError), stop=stop_after_attempt(4)):
        with attempt:
            trained = train(config)
    remote = {"model": trained.model, "data": "gs://b/data", "output": "gs://b/evaluated"}
    local = {"model": finished / "best", "data": data, "output": tmp_path / "evaluated"}
    ours, theirs = (
        evaluate(EvaluateConfig(**{k: str(v) for k, v in options.items()}, decode=DecodeConfig()))
        for options in (remote, local)
    )
    assert faults.outdated and ours.scores == theirs.scores
