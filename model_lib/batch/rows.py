"""The rows of captions as Parquet holds them, one for each image that was listed."""

import pyarrow as pa

from model_lib.io.errors import input_errors
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
"""Columns that there are besides when an image gets several captions."""
ABOUT = b"captioner"
"""Key of a Parquet file's metadata: what made it, as JSON."""


TYPES = {"uri": "text", "status": "text", "caption": "text", "score": "float", "error": "text"}
"""Columns that are read again."""


def read_shard(uri: str, columns: list[str] | None = None) -> pa.Table:
    """Return some columns of a shard's file, or all."""
    what = "captions that captioner batch wrote"
    types = {name: TYPES[name] for name in columns or TYPES}
    table = read_parquet(uri, types, what, others=columns is None)
    with input_errors(uri, what):
        table.validate(full=True)
    return table
