"""The rows of captions as Parquet holds them, one for each image that was listed."""

import pyarrow as pa
import pyarrow.parquet as pq

from model_lib.io import storage
from model_lib.io.validation import input_errors, require_columns

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
"""Columns that there are besides when an image gets several captions."""
ABOUT = b"captioner"
"""Key of a Parquet file's metadata: what made it, as JSON."""


def read_shard(uri: str, columns: list[str] | None = None) -> pa.Table:
    """Return the rows of a shard's file."""
    fs, path = storage.filesystem(uri)

    def read() -> pa.Table:
        with fs.open(path, "rb") as file:
            # Not pq.read_table: on an open file it leaves threads that abort the process at its
            # exit (pyarrow 25).
            return pq.ParquetFile(file).read(columns=columns)

    with input_errors(uri, "captions that captioner batch wrote"):
        table = storage.retry_remote(uri, read)
        wanted = {
            "uri": "text",
            "status": "text",
            "caption": "text",
            "score": "number",
            "error": "text",
        }
        require_columns(
            table.schema,
            {name: kind for name, kind in wanted.items() if not columns or name in columns},
        )
        table.validate(full=True)
    return table
