"""Ingest killed and started again, on records that lie, and on more images than memory holds."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model_lib.data.shards import read_manifest
from model_lib.ingest.config import IngestConfig
from model_lib.ingest.ingesting import help_ingest, ingest
from model_lib.ingest.journal import Journal
from tests.helpers.coco_files import write_captions
from tests.helpers.ingests import ingested


def many(folder: Path, count: int, side: int = 640) -> Path:
    """Make `count` images of noise, every 50th broken, that are many names of a few files; return
    their captions."""
    rng = np.random.default_rng(5)
    files = folder / "files"
    files.mkdir(parents=True)
    for n in range(10):
        noise = Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))
        noise.save(files / f"{n}.jpg", quality=60)
    (files / "broken.jpg").write_bytes(b"no image")
    names = [f"{n:06d}.jpg" for n in range(count)]
    for n, name in enumerate(names):
        (folder / name).symlink_to(files / ("broken.jpg" if n % 50 == 49 else f"{n % 10}.jpg"))
    return write_captions(folder / "captions.json", list(enumerate(names)))


def finished(output: Path) -> list[str]:
    """Return the names of the shards that are recorded as finished."""
    return [record.name.removesuffix(".json") for record in output.glob(".journal/*/*.json")]


def file_identity(file: Path) -> tuple[int, int]:
    return file.stat().st_ino, file.stat().st_mtime_ns


def test_killed_and_started_again_it_redoes_unfinished_shards_only(tmp_path: Path) -> None:
    file = many(tmp_path / "in", 400, side=300)
    command = [sys.executable, "-m", "model_lib", "ingest", "--shard_images", "40"]
    command += ["--annotations", str(file), "--images", str(file.parent), "--output"]
    whole_run = [*command, str(tmp_path / "whole"), "--workers", "1"]
    subprocess.run(whole_run, check=True, capture_output=True)
    output, rng = tmp_path / "killed", np.random.default_rng(11)
    kills, before, code = 0, {}, None
    while code is None:
        process = subprocess.Popen([*command, str(output)], stderr=subprocess.DEVNULL)
        target = len(before) + int(rng.integers(1, 4))
        while process.poll() is None and (kills == 5 or len(finished(output)) < target):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        code = process.poll()
        if code is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        for name, times in before.items():
            assert times == file_identity(output / name), f"{name} was written again"
        before = {name: file_identity(output / name) for name in finished(output)}
    assert code == 0
    assert kills >= 3
    assert sorted(os.listdir(output)) == sorted(os.listdir(tmp_path / "whole"))
    for whole_file in (tmp_path / "whole").glob("*.parquet"):
        assert whole_file.read_bytes() == (output / whole_file.name).read_bytes(), whole_file.name
    whole, resumed = (read_manifest(str(tmp_path / name)) for name in ("whole", "killed"))
    assert whole.fingerprint == resumed.fingerprint
    reasons = {"unreadable": 8, "duplicate_of_train": 46}
    assert whole.quarantined == resumed.quarantined == reasons


def test_records_of_other_input_or_of_damaged_shards_are_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, output = many(tmp_path / "in", 100), tmp_path / "out"
    options = {"annotations": file, "images": file.parent, "shard_images": 10}
    # As after a kill before the manifest.
    with monkeypatch.context() as patched:
        patched.setattr(Journal, "close", lambda journal, is_shared: None)
        ingested(output, **options)
    (output / "manifest.json").unlink()
    first, second, *_ = sorted(output.glob("train-*.parquet"))
    before, whole = file_identity(first), second.read_bytes()
    second.write_bytes(whole[:-1] + b"X")
    with monkeypatch.context() as patched:
        patched.setattr(Journal, "close", lambda journal, is_shared: None)
        ingested(output, **options)
    assert second.read_bytes() == whole and file_identity(first) == before
    ingested(output, **options, jpeg_quality=50)
    assert file_identity(first) != before


def test_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    """Images of 15 MB in all against 75: what grows is the list of names and captions alone."""
    peaks, sizes = [], []
    code = (
        "import sys, pathlib\n"
        "from tests.helpers.ingests import ingested\n"
        "ingested(sys.argv[3], annotations=sys.argv[1], images=sys.argv[2], workers=2)\n"
        "status = pathlib.Path('/proc/self/status').read_text()\n"
        "print(int(status.partition('VmHWM:')[2].split()[0]) / 1024)"
    )
    for count in (500, 2500):
        file, output = many(tmp_path / str(count), count, side=192), tmp_path / f"out{count}"
        command = [sys.executable, "-c", code, str(file), str(file.parent), str(output)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks.append(float(done.stdout))
        sizes.append(sum(file.stat().st_size for file in output.iterdir()) / 2**20)
    assert sizes[1] - sizes[0] > 50 and peaks[1] - peaks[0] < 45, (sizes, peaks)


@pytest.mark.parametrize("is_published", [False, True])
def test_several_workers_write_the_bytes_of_one(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_published: bool
) -> None:
    monkeypatch.setenv("KFP_RUN_ID", "run")
    source: dict[str, str] = {"dataset": str(scenes)}
    if not is_published:
        file = many(tmp_path / "in", 200, side=64)
        source = {"annotations": str(file), "images": str(file.parent)}
    one = IngestConfig(output=str(tmp_path / "one"), **source, shard_images=7)
    several = replace(one, output=str(tmp_path / "several"))
    expected = ingest(one)
    with ThreadPoolExecutor(2) as pool:  # one that ended, two at the same time, one that never came
        help_ingest(several, 1, 4)
        written = len(list((tmp_path / "several").glob("*.parquet")))
        second = pool.submit(help_ingest, several, 2, 4)
        manifest = ingest(several, workers=4)
        second.result()
    assert written > 1 and manifest.fingerprint == expected.fingerprint
    assert (manifest.shards, manifest.quarantined) == (expected.shards, expected.quarantined)
    for file in (tmp_path / "one").glob("*.parquet"):
        assert file.read_bytes() == (tmp_path / "several" / file.name).read_bytes(), file.name
    before = {file: file_identity(file) for file in (tmp_path / "several").glob("*.parquet")}
    help_ingest(several, 3, 4)  # too late
    assert before == {file: file_identity(file) for file in before}
    assert read_manifest(several.output).fingerprint == expected.fingerprint
