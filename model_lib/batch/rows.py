"""The rows of captions in Parquet, one for each listed image."""

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from model_lib.io import storage
from model_lib.io.validation import read_parquet

FIELDS = [
    ("uri", pa.string()),
    ("status", pa.string()),
    ("caption", pa.string()),
    ("score", pa.float32()),
    ("error", pa.string()),
    ("width", pa.int32()),
    ("height", pa.int32()),
    ("bytes", pa.int64()),
    ("model", pa.string()),
    ("captioned_at", pa.timestamp("us", tz="UTC")),
]
SEVERAL = [("captions", pa.list_(pa.string())), ("scores", pa.list_(pa.float32()))]
"""Further columns if an image gets several captions."""
METADATA_KEY = b"captioner"
"""Key of a file's metadata: how it was made, as JSON."""
WHAT = "captions that captioner batch wrote"
Row = dict[str, Any]
TYPES = {"uri": "text", "status": "text", "caption": "text", "score": "float", "error": "text"}
"""Columns that are read again …"""
COLUMNS = list(TYPES)
"""… by their names."""


def write_table(table: pa.Table, uri: str) -> None:
    with storage.atomic_file(uri) as part:
        pq.write_table(table, part)


def read_shard(uri: str, columns: list[str] | None = None) -> pa.Table:
    """Return some columns of a shard's file, or all."""
    types = {name: TYPES[name] for name in columns or TYPES}
    return read_parquet(uri, types, WHAT, others=columns is None)
