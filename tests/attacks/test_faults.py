"""Disks that are full, memory that is used up, and clocks that jump, in every stage."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest

from model_lib.batch.batching import batch
from model_lib.data.shards import read_manifest
from model_lib.errors import WorkError
from model_lib.evaluate.config import EvaluateConfig
from model_lib.evaluate.evaluation import evaluate
from model_lib.model.config import DecodeConfig
from model_lib.tracking.server import MlflowTracking
from model_lib.train.checkpoint import Checkpoints
from model_lib.train.training import train
from tests.helpers.batches import batch_config
from tests.helpers.ingests import ingested
from tests.helpers.services import empty_store
from tests.helpers.steps import before_steps
from tests.helpers.training import interrupt_at, same_best, train_config

FULL = "cannot be written: the disk is full; make room there and start again"


def fill(disk: Path, left: int) -> Path:
    """Fill a disk but for so many bytes; return the file to delete."""
    filler = disk / "filler"
    filler.write_bytes(bytes(max(0, shutil.disk_usage(disk).free - left)))
    return filler


def content(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_ingest_to_a_full_disk_is_one_line_and_goes_on_after_room_is_made(
    scenes: Path, small_disk: Path, tmp_path: Path, captioner: Callable
) -> None:
    options = ["--dataset", scenes, "--output", small_disk / "data", "--store", "original"]
    whole = ingested(tmp_path / "whole", dataset=scenes, store="original")
    filler = fill(small_disk, 50_000)
    done = captioner("ingest", *options)
    assert done.returncode == 1, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("ingest: ")]
    assert line.startswith(f"captioner: failed: {small_disk}/data/") and line.endswith(FULL)
    written = (small_disk / "data").iterdir()
    assert not [file for file in written if file.name.endswith(".parquet") or ".part-" in file.name]
    filler.unlink()
    assert captioner("ingest", *options).returncode == 0
    assert read_manifest(str(small_disk / "data")).fingerprint == whole.fingerprint


def test_a_batch_on_a_full_disk_keeps_its_shards_and_goes_on(
    scenes: Path, saved_model: Path, small_disk: Path
) -> None:
    output = small_disk / "out"
    config = batch_config(scenes / "val2017", output, saved_model, shard_images=2)
    filler = fill(small_disk, 45_000)
    with pytest.raises(WorkError, match=FULL):
        batch(config)
    before = content(output)
    shards = {name for name in before if "/captions/" in name}
    assert 0 < len(shards) < 6 and not [name for name in before if ".part-" in name]
    filler.unlink()
    summary = batch(config)
    assert (summary.images, summary.ok) == (12, 12)
    after = content(output)
    assert all(after[name] == before[name] for name in shards)


def test_no_room_for_the_best_model_is_one_line_and_the_run_goes_on(
    data: Path, finished: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = train_config(data, small_disk / "run", epochs=3)
    with monkeypatch.context() as patched:
        before_steps(patched, lambda step: fill(small_disk, 300_000) if step == 1 else None)
        with pytest.raises(WorkError, match=rf"run/best/[a-z.]+: {FULL}"):
            train(config)
    assert not list((small_disk / "run").rglob(".part-*"))
    (small_disk / "filler").unlink()
    train(config)
    assert same_best(small_disk / "run", finished)


def test_an_evaluation_on_a_full_disk_leaves_whole_files_and_is_written_after_room_is_made(
    data: Path, finished: Path, small_disk: Path
) -> None:
    output = small_disk / "evaluated"
    options = {"model": str(finished / "best"), "data": str(data), "output": str(output)}
    config = EvaluateConfig(**options, decode=DecodeConfig(), limit=4)
    filler = fill(small_disk, 20_000)
    with pytest.raises(WorkError, match=rf"{output}/[a-z]+\.[a-z]+: {FULL}"):
        evaluate(config)
    assert not (output / "scores.json").exists(), "which is written last"
    filler.unlink()
    evaluation = evaluate(config)
    assert json.loads((output / "scores.json").read_text())["scores"] == evaluation.scores


LITTLE_MEMORY = """
import resource, sys
import model_lib.ingest.ingesting, model_lib.ingest.transcode
from model_lib.cli import main
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
# 6 MB: less than a thread's stack
resource.setrlimit(resource.RLIMIT_AS, (now + 6 * 2**20, now + 6 * 2**20))
main(["ingest", *sys.argv[1:]])
"""


def test_memory_that_is_used_up_is_one_line(scenes: Path, tmp_path: Path) -> None:
    options = ["--dataset", str(scenes), "--output", str(tmp_path / "out")]
    command = [sys.executable, "-c", LITTLE_MEMORY, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("captioner: failed: out of memory"), done.stderr


def test_training_under_a_clock_that_jumps_ends_the_same_with_its_curves_in_order(
    data: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It jumps by up to a day, either way, at every look."""
    rng, now = random.Random(0), time.time
    monkeypatch.setattr("time.time", lambda: now() + rng.uniform(-86400, 86400))
    tracking = MlflowTracking(empty_store(tmp_path))
    config = train_config(data, tmp_path / "run", epochs=3, log_steps=1, checkpoint_steps=1)
    interrupt_at(3, config, tracking)
    folders = sorted((tmp_path / "run" / "checkpoints").iterdir(), reverse=True)
    for number, folder in enumerate(folders):
        os.utime(folder, (10**9 + number, 10**9 + number))  # the newest looks oldest
    assert "step-00000003" in (Checkpoints(config.output).newest() or "")
    trained = train(config, tracking)
    assert same_best(tmp_path / "run", finished)
    points = mlflow.MlflowClient(tracking.uri).get_metric_history(trained.run_id, "train_loss")
    points.sort(key=lambda point: (point.timestamp, point.step))
    assert [point.step for point in points] == [1, 2, 3, 4, 5, 6]
