"""Tables of `file,caption`: CSV, JSON lines and Parquet, read a row at a time."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from model_lib.errors import UserError, first_line

COLUMNS = ("file", "caption")


def read_table(uri: str, path: Path) -> Iterator[tuple[str, str]]:
    """Yield each row's file and caption; a missing caption is an empty one.

    Args:
        uri: what the table is called, for messages; its ending is the format.
        path: of the table.

    Raises:
        UserError: it is damaged, has no such columns, or something else than text in them.
    """
    try:
        for number, (file, caption) in READERS["." + uri.lower().rpartition(".")[2]](path):
            if not isinstance(file, str) or not file:
                raise UserError(f"{uri}: row {number}: file {file!r} is not a file's name")
            if caption is not None and not isinstance(caption, str):
                raise UserError(f"{uri}: row {number}: caption {caption!r} is not text")
            yield file, caption or ""
    except KeyError as error:
        raise UserError(
            f"{uri}: has no column {error}; expected the columns file and caption"
        ) from error
    except (pa.ArrowException, csv.Error, ValueError, OSError) as error:
        raise UserError(f"{uri}: cannot be read as a table: {first_line(error)}") from error


def _csv(path: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for name in COLUMNS:
            if name not in (reader.fieldnames or ()):
                raise KeyError(name)
        for row in reader:
            yield reader.line_num, [row[name] for name in COLUMNS]


def _jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"row {number} is not an object")
                yield number, [row[name] for name in COLUMNS]


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    with pq.ParquetFile(path) as table:
        for name in COLUMNS:
            if name not in table.schema_arrow.names:
                raise KeyError(name)
            if table.schema_arrow.names.count(name) > 1:
                raise ValueError(f"has several columns {name}")
        number = 0
        for batch in table.iter_batches(columns=list(COLUMNS)):
            for row in batch.to_pylist():
                number += 1
                yield number, [row[name] for name in COLUMNS]


READERS = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}
"""For each ending that can be read, what yields the number and the values of each row."""
