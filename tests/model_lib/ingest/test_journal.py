"""Ingest killed and started again, on records that lie, and on more images than memory holds."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from model_lib.data.shards import read_manifest
from model_lib.ingest.config import IngestConfig
from model_lib.ingest.ingesting import ingest
from model_lib.ingest.journal import Journal
from tests.helpers.coco_files import write_captions


def many(folder: Path, count: int, side: int = 640) -> Path:
    """Make `count` images of noise, every 50th broken, that are many names of a few files; return
    their captions."""
    rng = np.random.default_rng(5)
    (folder / "files").mkdir(parents=True)
    for n in range(10):
        Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(
            folder / "files" / f"{n}.jpg", quality=60
        )
    (folder / "files" / "broken.jpg").write_bytes(b"no image")
    names = [f"{n:06d}.jpg" for n in range(count)]
    for n, name in enumerate(names):
        (folder / name).symlink_to(
            folder / "files" / ("broken.jpg" if n % 50 == 49 else f"{n % 10}.jpg")
        )
    return write_captions(folder / "captions.json", list(enumerate(names)))


COMMAND = [sys.executable, "-m", "model_lib", "ingest", "--shard_mb", "2"]


def test_killed_and_started_again_it_redoes_unfinished_shards_only(tmp_path: Path) -> None:
    file = many(tmp_path / "in", 400, side=300)
    command = [*COMMAND, "--annotations", str(file), "--images", str(file.parent), "--output"]
    subprocess.run(
        [*command, str(tmp_path / "whole"), "--workers", "1"], check=True, capture_output=True
    )
    output, rng = tmp_path / "killed", np.random.default_rng(11)
    kills, before = 0, {}
    while True:
        process = subprocess.Popen(
            [*command, str(output)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        target = len(before) + int(rng.integers(1, 4))
        records = lambda: list(output.glob(".journal/*/*.json"))  # noqa: E731
        while process.poll() is None and (kills == 5 or len(records()) < target):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        done = process.poll()
        if done is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        now = {
            r.name.removesuffix(".json"): (output / r.name.removesuffix(".json")).stat()
            for r in records()
        }
        for name, stat in before.items():
            there = (output / name).stat()
            assert (there.st_ino, there.st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns), (
                f"{name} was written again"
            )
        if done is not None:
            assert done == 0
            break
        before = now
    assert kills >= 3
    assert sorted(os.listdir(output)) == sorted(os.listdir(tmp_path / "whole"))
    for whole_file in (tmp_path / "whole").glob("*.parquet"):
        assert whole_file.read_bytes() == (output / whole_file.name).read_bytes(), whole_file.name
    whole, resumed = (read_manifest(str(tmp_path / name)) for name in ("whole", "killed"))
    assert (
        whole.fingerprint == resumed.fingerprint
        and whole.quarantined
        == resumed.quarantined
        == {
            "unreadable": 8,
            "duplicate_of_train": 46,
        }
    )


def test_records_of_other_input_or_of_damaged_shards_are_not_taken(tmp_path: Path) -> None:
    file = many(tmp_path / "in", 100)
    output = tmp_path / "out"
    sources = {"annotations": str(file), "images": str(file.parent)}
    config = IngestConfig(**sources, output=str(output), shard_mb=1)

    def interrupted() -> None:
        """Leave what an ingest leaves that was killed before its manifest."""
        kept: Callable = Journal.close
        Journal.close = lambda self: None  # type: ignore[method-assign]
        try:
            ingest(config)
        finally:
            Journal.close = kept  # type: ignore[method-assign]
        (output / "manifest.json").unlink()

    interrupted()
    shard = sorted(output.glob("train-*.parquet"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + b"X")
    first = sorted(output.glob("train-*.parquet"))[0].stat().st_mtime_ns
    ingest(config)
    assert shard.read_bytes() == whole
    assert sorted(output.glob("train-*.parquet"))[0].stat().st_mtime_ns == first
    interrupted()
    first = sorted(output.glob("train-*.parquet"))[0].stat().st_mtime_ns
    ingest(replace(config, jpeg_quality=50))
    assert sorted(output.glob("train-*.parquet"))[0].stat().st_mtime_ns != first


def test_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    """Images of 15 MB in all against 75: what grows is the list of names and captions alone."""
    peaks = []
    for count in (500, 2500):
        file = many(tmp_path / str(count), count, side=192)
        code = (
            "import sys, pathlib\n"
            "from model_lib.ingest.config import IngestConfig\n"
            "from model_lib.ingest.ingesting import ingest\n"
            "ingest(IngestConfig(annotations=sys.argv[1], images=sys.argv[2], output=sys.argv[3], "
            "workers=2))\n"
            "status = pathlib.Path('/proc/self/status').read_text()\n"
            "print(int(status.partition('VmHWM:')[2].split()[0]) / 1024)"
        )
        arguments = [str(file), str(file.parent), str(tmp_path / f"out{count}")]
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True
        )
        peaks.append(float(done.stdout))
    sizes = [
        sum(f.stat().st_size for f in (tmp_path / f"out{count}").iterdir()) / 2**20
        for count in (500, 2500)
    ]
    assert sizes[1] - sizes[0] > 50 and peaks[1] - peaks[0] < 30, (sizes, peaks)
