"""Ingest in tests: options as paths, and the rows that come out."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from model_lib.data.shards import Manifest, read_manifest
from model_lib.ingest.config import IngestConfig
from model_lib.ingest.ingesting import ingest


def ingested(output: Path | str, **options: Any) -> Manifest:
    """Ingest into `output`; options may be paths."""
    texts = {name: str(v) if isinstance(v, Path) else v for name, v in options.items()}
    return ingest(IngestConfig(output=str(output), **texts))


def read_rows(manifest: Manifest) -> list[dict]:
    """Return the rows of all shards."""
    shards = read_manifest(manifest.uri).shards
    return [row for shard in shards for row in pq.read_table(shard.uri).to_pylist()]


def read_quarantine(manifest: Manifest) -> list[dict]:
    return pq.read_table(Path(manifest.uri, "quarantine.parquet")).to_pylist()
