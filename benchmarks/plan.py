"""Seconds and memory of planning a large bucket, against a sorted list of its objects.

    python -m benchmarks.plan [--objects 10000000] [--theirs 1000000] [--milliseconds 30]

A store in this process answers as S3 does, a page of 1,000 objects after `--milliseconds`. Ours is
the whole step: list, sort, split into shards, write the listing and the plan; and then once more,
compared with that plan. The baseline is `sorted(fs.find(...))` with everything in memory, split
alike and written as Parquet, at a number that fits. Each case has a fresh process. It prints a
table and ends with one line of JSON.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec

PAGE, FOLDER = 1000, 20_000
"""Objects of a page, and of a folder."""
SHARD = 1000


class FakeStore(fsspec.AbstractFileSystem):
    """A bucket of images in folders, which holds nothing: names and sizes follow from numbers."""

    protocol = "fake"
    cachable = False
    objects = 0
    seconds = 0.0

    def split_path(self, path: str) -> tuple[str, str, None]:
        bucket, _, key = self._strip_protocol(path).partition("/")
        return bucket, key, None

    def isdir(self, path: str) -> bool:
        return True

    def call_s3(
        self, method: str, Prefix: str, Delimiter: str, ContinuationToken: str = "0", **_: str
    ) -> dict[str, Any]:
        """Answer `list_objects_v2`."""
        time.sleep(self.seconds)
        below = Prefix.removeprefix("images/")
        if Delimiter and not below:
            count = -(-self.objects // FOLDER)
            return {"CommonPrefixes": [{"Prefix": f"images/{n:06d}/"} for n in range(count)]}
        start = int(below[:6] or 0) * FOLDER
        end = min(self.objects, start + FOLDER if below else self.objects)
        first = start + int(ContinuationToken)
        last = min(first + PAGE, end)
        token = {} if last == end else {"NextContinuationToken": str(last - start)}
        return {"Contents": [self.item(number) for number in range(first, last)], **token}

    def item(self, number: int) -> dict[str, Any]:
        # In order within a folder only, and unlike each other, as names and tags are.
        name = f"images/{number // FOLDER:06d}/{number * 2654435761 % 2**32:08x}-{number:09d}.jpg"
        tag = f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}"
        return {"Key": name, "Size": 50_000 + number % 100_000, "ETag": tag, "LastModified": 1}

    def find(self, path: str, **_: Any) -> dict[str, dict[str, Any]]:  # type: ignore[override]
        """Return all of it, as the drivers do."""
        files, token = {}, "0"
        while True:
            page = self.call_s3("", Prefix="images/", Delimiter="", ContinuationToken=token)
            for item in page["Contents"]:
                files[f"bucket/{item['Key']}"] = {**item, "name": item["Key"], "type": "file"}
            token = page.get("NextContinuationToken", "")
            if not token:
                return files


def ours(output: Path) -> None:
    from model_lib.batch.config import BatchConfig
    from model_lib.batch.planning import write_plan

    config = BatchConfig(images="fake://bucket/images", output=str(output), model="m")
    plan = write_plan(config, str(output / "plan"))
    assert sum(shard.images for shard in plan.shards) == FakeStore.objects


def theirs(output: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    fs = fsspec.filesystem("fake")
    files = sorted(fs.find("bucket/images", detail=True).items())
    shards = [files[start : start + SHARD] for start in range(0, len(files), SHARD)]
    with pq.ParquetWriter(
        output / "listing.parquet",
        pa.schema([("uri", pa.string()), ("bytes", pa.int64()), ("version", pa.string())]),
    ) as writer:
        for shard in shards:
            rows = [(f"fake://{path}", info["Size"], info["ETag"]) for path, info in shard]
            columns = zip(writer.schema.names, zip(*rows, strict=True), strict=True)
            writer.write_table(pa.table(dict(columns), writer.schema))


CASES: dict[str, Callable[[Path], None]] = {"ours": ours, "theirs": theirs}


def measure(case: str, output: Path) -> None:
    """Run a case in this process; print its seconds, those of a core, peak memory in GB and the
    folder's MB."""
    began, worked = time.perf_counter(), time.process_time()
    CASES[case](output)
    seconds, worked = time.perf_counter() - began, time.process_time() - worked
    (peak,) = re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    print(json.dumps([seconds, worked, int(peak) * 1024 / 1e9, size / 1e6]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--objects", type=int, default=10_000_000)
    parser.add_argument("--theirs", type=int, default=1_000_000, help="objects of the baseline")
    parser.add_argument("--milliseconds", type=float, default=30.0, help="a page takes")
    parser.add_argument("--measure", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        FakeStore.objects, FakeStore.seconds = options.objects, options.milliseconds / 1000
        fsspec.register_implementation("fake", FakeStore)
        measure(options.measure, options.output)
        return
    device = f"CPU, {os.cpu_count()} cores"
    print(f"\n{device}; pages of {PAGE:,} objects, {options.milliseconds:g} ms each\n")
    heading = f"{'case':<22}{'objects':>12}{'s':>8}{'core s':>8}{'objects/s':>11}"
    print(f"{heading}{'GB':>7}{'MB written':>12}")
    small = min(options.objects, options.theirs)
    rows: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, case, count in (
            ("sorted(fs.find())", "theirs", small),
            ("ours, as many", "ours", small),
            ("ours", "ours", options.objects),
            ("ours, planned again", "ours", options.objects),
        ):
            output = Path(scratch, case if case == "theirs" else str(count))
            output.mkdir(exist_ok=True)
            command = [sys.executable, "-m", "benchmarks.plan", "--measure", case]
            command += ["--objects", str(count), "--milliseconds", str(options.milliseconds)]
            command += ["--output", str(output)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
            seconds, worked, memory, size = json.loads(done.stdout)
            rows[name] = count / seconds, memory
            times = f"{seconds:>8.1f}{worked:>8.1f}{count / seconds:>11,.0f}"
            print(f"{name:<22}{count:>12,}{times}{memory:>7.2f}{size:>12.1f}", flush=True)
    rate, memory = rows.pop("sorted(fs.find())")
    results = [
        {
            "case": name,
            "baseline": f"sorted(fs.find()) of {small} objects",
            "unit": "objects/s",
            "ours": round(own_rate),
            "theirs": round(rate),
            "ratio": round(own_rate / rate, 2),
            "peak_memory_gb": round(own_memory, 3),
            "their_peak_memory_gb": round(memory, 3),
        }
        for name, (own_rate, own_memory) in rows.items()
    ]
    document = {"benchmark": "plan", "device": device, "torch": None, "results": results}
    print(json.dumps(document))


if __name__ == "__main__":
    main()
