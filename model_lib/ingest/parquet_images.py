"""Parquet files that hold images beside their captions, as Hugging Face's data sets do."""

import hashlib
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from model_lib.data.coco import name_id
from model_lib.data.tables import ListColumns, values_of
from model_lib.ingest.annotations import CaptionsByName
from model_lib.ingest.listing import Listing
from model_lib.io import storage
from model_lib.io.errors import input_errors
from model_lib.io.images import ImageError, require_readable

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes")
"""Names of columns of images; Hugging Face's own type may have any name."""
BATCH = 16
"""Rows that are read at once."""
KEPT = 16
"""Batches that are kept, as threads do not read in order: more rows than a machine has cores."""
BUFFER = 2**20
"""Bytes that are read at once at least."""
WHAT = "a Parquet file of images and captions"


def image_column(uri: str) -> str | None:
    """Return the name of the column that holds images, in bytes, or None."""
    with _open(uri) as file:
        return next((f.name for f in file.schema_arrow if _holds_images(f)), None)


def _holds_images(field: pa.Field) -> bool:
    if pa.types.is_struct(field.type):
        return {"bytes", "path"} <= {part.name for part in field.type}
    is_binary = pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type)
    return is_binary and field.name.lower() in IMAGE_COLUMNS


def _open(uri: str) -> pq.ParquetFile:
    """Open a file to be read as a stream: without a buffer, Arrow reads a row group's column whole,
    and a row group may have all images."""
    with input_errors(uri, WHAT):
        return pq.ParquetFile(storage.open_file(uri, BUFFER), buffer_size=BUFFER, pre_buffer=False)


class ParquetImages:
    """Images of Parquet files, each by its name, which stands for a file and a row in it.

    Rows are read in batches from a file's start on, as a row group may have all images: fast where
    images are read about in their order.
    """

    takes_any_name = True

    def __init__(self, root: str, column: str) -> None:
        self.root, self.column = root, column
        self.rows: dict[str, tuple[str, int]] = {}
        """Each image's file and row."""
        self.lock = threading.Lock()
        self.current = ""
        """The file that is being read."""
        self.batches: Iterator[pa.RecordBatch] = iter(())
        self.end = 0
        """Number of the row after the last batch."""
        self.kept: deque[tuple[int, pa.Array]] = deque(maxlen=KEPT)
        """Batches, with the number of their first row."""

    def uri(self, name: str) -> str:
        file, row = self.rows[name]
        return f"{file}#{row}"

    def read(self, name: str) -> bytes:
        file, row = self.rows[name]
        with self.lock, input_errors(file, WHAT):
            content = _content(self._value(file, row))
        if content is None:
            raise ImageError("empty", "the row has no image")
        require_readable(len(content))
        return content

    def _value(self, file: str, row: int) -> pa.Scalar:
        if file != self.current or (self.kept and row < self.kept[0][0]):
            self.current, self.end = file, 0
            self.kept.clear()
            self.batches = _open(file).iter_batches(BATCH, columns=[self.column])
        while row >= self.end:
            values = next(self.batches).column(0)
            self.kept.append((self.end, values))
            self.end += len(values)
        return next(values[row - first] for first, values in reversed(self.kept) if first <= row)


def _content(value: pa.Scalar) -> bytes | None:
    content = value.as_py()
    return content["bytes"] if isinstance(content, dict) else content


def add_parquet(
    listing: Listing,
    root: str,
    splits: Mapping[str, str],
    column: str,
    names: Mapping[str, str] | None = None,
) -> None:
    """Add the images of Parquet files, in the files' order.

    Rows of one image make one entry. Where paths are missing, or several rows have one, images are
    recognised by their bytes, which takes a pass over the files.

    Args:
        listing: to add to.
        root: path or URI of the files' folder.
        splits: of each file, by URI.
        column: of the images.
        names: see `read_table`.
    """
    source = ParquetImages(root, column)
    images = CaptionsByName(listing, "auto")
    tables = {uri: _read_texts(uri, column, names) for uri in splits}
    paths = [path for rows in tables.values() for path, _ in rows]
    are_distinct = all(paths) and len(set(paths)) == len(paths)
    keys = iter(paths if are_distinct else chain.from_iterable(_digests(u, column) for u in splits))
    names_of: dict[str | None, str] = {}
    for uri, rows in tables.items():
        images.split = splits[uri]
        for number, (path, values) in enumerate(rows):
            key = next(keys)
            if key is None:
                listing.reject(path or "", "bad_row", f"{uri}: row {number + 1} has no image")
                continue
            if key not in names_of:
                own = f"{uri.removeprefix(root).strip('/').removesuffix('.parquet')}/{number:06d}"
                names_of[key] = path if path and path not in source.rows else own
                source.rows[names_of[key]] = uri, number
            images.add(names_of[key], number + 1, values)
    for name, (split, captions) in images.rows.items():
        listing.add(name_id(name), name, split, source, captions)


def _read_texts(
    uri: str, column: str, names: Mapping[str, str] | None
) -> list[tuple[str | None, dict[str, Any]]]:
    """Return each row's path, if it has one, and its caption and split."""
    with _open(uri) as file, input_errors(uri, WHAT):
        schema = file.schema_arrow
        others = [name for name in schema.names if name != column]
        own = ListColumns(uri, names or {}, ("caption",)).require(others)
        own.pop("file", None)
        has_path = pa.types.is_struct(schema.field(column).type)
        columns = [*chain.from_iterable(own.values()), *([f"{column}.path"] if has_path else [])]
        rows = []
        for batch in file.iter_batches(columns=columns):
            for row in batch.to_pylist():
                path = (row.get(column) or {}).get("path")
                rows.append((path, values_of(own, row)))
        return rows


def _digests(uri: str, column: str) -> Iterator[str | None]:
    """Yield the SHA-256 of each row's image."""
    with _open(uri) as file, input_errors(uri, WHAT):
        for batch in file.iter_batches(BATCH, columns=[column]):
            for value in batch.column(0):
                content = _content(value)
                yield None if content is None else hashlib.sha256(content).hexdigest()
