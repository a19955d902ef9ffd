"""Captioning a folder in tests: small configurations, plans, and the rows that come out."""

from pathlib import Path

import pyarrow.parquet as pq

from model_lib.batch.config import BatchConfig
from model_lib.batch.merging import Summary
from model_lib.batch.planning import Plan, output_folder, resolve, write_plan


def batch_config(images: object, output: object, model: Path, **options: object) -> BatchConfig:
    """Return a configuration with five images a shard."""
    sources = {"images": str(images), "output": str(output), "model": str(model)}
    return BatchConfig.from_options(**{"shard_images": 5, **sources, **options})


def make_plan(config: BatchConfig) -> Plan:
    config = resolve(config)
    return write_plan(config, output_folder(config))


def read_rows(summary: Summary) -> list[dict]:
    """Return the rows of all files, sorted by URI."""
    tables = map(pq.read_table, Path(summary.captions).iterdir())
    rows = (row for table in tables for row in table.to_pylist())
    return sorted(rows, key=lambda row: row["uri"])


def file_times(summary: Summary) -> dict[str, int]:
    """Return when each file was written, in nanoseconds."""
    return {file.name: file.stat().st_mtime_ns for file in Path(summary.captions).iterdir()}
