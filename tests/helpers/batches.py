"""Captioning in tests: small configurations, plans, and the rows that come out."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from model_lib.batch.config import BatchConfig
from model_lib.batch.merging import Summary
from model_lib.batch.planning import Plan, output_folder, resolve, write_plan
from model_lib.batch.rows import FIELDS, METADATA_KEY, write_table


def batch_config(images: object, output: object, model: object, **options: object) -> BatchConfig:
    """Return a configuration with five images a shard."""
    sources = {"images": str(images), "output": str(output), "model": str(model)}
    return BatchConfig.from_options(**{"shard_images": 5, **sources, **options})


def make_plan(config: BatchConfig) -> Plan:
    config = resolve(config)
    return write_plan(config, output_folder(config))


def write_captions(plan: Plan, index: int, rows: Iterable[dict[str, Any]]) -> None:
    """Write a shard's rows as if a model had captioned its images; each row but its URI."""
    pairs = zip(plan.images(index), rows, strict=True)
    row = {"status": "ok", "caption": "red", "score": -1.5, "model": "m"}
    schema = pa.schema(FIELDS).with_metadata({METADATA_KEY: '{"seconds": 1}'})
    table = pa.Table.from_pylist([{**row, **own, "uri": image.uri} for image, own in pairs], schema)
    write_table(table, plan.captions_uri(index))


def rows_of(files: Iterable[Any]) -> list[dict]:
    """Return the rows of Parquet files, sorted by URI."""
    rows = (row for file in files for row in pq.read_table(file).to_pylist())
    return sorted(rows, key=lambda row: row["uri"])


def read_rows(summary: Summary) -> list[dict]:
    """Return the rows of a local batch."""
    return rows_of(Path(summary.captions).iterdir())


def read_output(output: object, fs: fsspec.AbstractFileSystem | None = None) -> list[dict]:
    """Return the rows of the only batch in an output folder, or in one of a bucket."""
    fs = fs or fsspec.filesystem("file")
    return rows_of(fs.open(file) for file in fs.glob(f"{output}/*/captions/*.parquet"))


def captions_by_name(rows: list[dict]) -> dict[str, str | None]:
    """Return each image's caption by its file name; no two images have one."""
    captions = {Path(row["uri"]).name: row["caption"] for row in rows}
    assert len(captions) == len(rows)
    return captions


def file_times(summary: Summary) -> dict[str, int]:
    """Return when each file was written, in nanoseconds."""
    return {file.name: file.stat().st_mtime_ns for file in Path(summary.captions).iterdir()}
