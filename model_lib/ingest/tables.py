"""Tables of `file,caption`: CSV, JSON lines and Parquet, read a row at a time."""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from model_lib.io.errors import input_errors
from model_lib.io.remote_cache import local_file

COLUMNS = ["file", "caption"]


def read_table(uri: str) -> Iterator[tuple[str, str]]:
    """Yield each row's file and caption of the table at `uri`; a missing caption is an empty one.

    Raises:
        UserError: it is missing or damaged, or lacks these columns of text.
    """
    read_rows = READERS["." + uri.lower().rpartition(".")[2]]
    with local_file(uri) as path, input_errors(uri, "a table with the columns file and caption"):
        for number, row in enumerate(read_rows(path), 1):
            if not isinstance(row, dict):
                raise TypeError(f"row {number} is not an object")
            file, caption = (row[name] for name in COLUMNS)
            if not isinstance(file, str) or not file:
                raise TypeError(f"row {number}: file {file!r} is not a file's name")
            if not isinstance(caption, str | None):
                raise TypeError(f"row {number}: caption {caption!r} is not text")
            yield file, caption or ""


def _require_columns(names: Sequence[str]) -> None:
    for name in COLUMNS:
        if names.count(name) != 1:
            raise ValueError(f"has {names.count(name) or 'no'} column {name}")


def _csv(path: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        _require_columns(reader.fieldnames or ())
        yield from reader


def _jsonl(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig") as file:
        yield from (json.loads(line) for line in file if line.strip())


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    with pq.ParquetFile(path) as table:
        _require_columns(table.schema_arrow.names)
        for batch in table.iter_batches(columns=COLUMNS):
            yield from batch.to_pylist()


READERS = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}
"""For each ending of a table, a function that yields its rows."""
