"""Checks of files that are read: JSON as a dataclass, Parquet with the columns it needs.

Files come from buckets that others write to, from other versions and from disks that fail.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from model_lib.io import storage
from model_lib.io.errors import input_errors

T = TypeVar("T")


def parse(kind: type[T], document: bytes | str | dict[str, Any]) -> T:
    """Return a JSON document as a dataclass, without conversions between types.

    Raises:
        ValueError: it is not JSON, or a field is missing or of another type.
    """
    from pydantic import TypeAdapter, ValidationError

    content = json.dumps(document) if isinstance(document, dict) else document
    try:
        return TypeAdapter(kind).validate_json(content, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}: {first['msg']}" if where else first["msg"]) from None


def read_record(uri: str, kind: type[T], what: str) -> T:
    """Return the JSON file at `uri` as a dataclass; `UserError` as `input_errors(uri, what)`."""
    content = storage.read_bytes(uri)
    with input_errors(uri, what):
        return parse(kind, content)


def require_file_name(name: str) -> str:
    """Return a file's name; `ValueError` if it is a path, which could lead out of the folder."""
    if not name or name in (".", "..") or any(character in name for character in "/\\:\0"):
        raise ValueError(f"{name!r:.60} is not the name of a file beside it")
    return name


TYPES: Mapping[str, Callable[[pa.DataType], bool]] = {
    "int": pa.types.is_integer,
    "float": lambda kind: pa.types.is_floating(kind) or pa.types.is_integer(kind),
    "text": pa.types.is_string,
    "bytes": pa.types.is_binary,
    "list of text": pa.list_(pa.string()).equals,
    "list of bytes": pa.list_(pa.binary()).equals,
}


def require_columns(schema: pa.Schema, columns: Mapping[str, str]) -> None:
    """Raise `TypeError` unless there is each column once, of its type, one of `TYPES`."""
    for name, kind in columns.items():
        if schema.names.count(name) != 1:
            raise TypeError(f"has {schema.names.count(name) or 'no'} columns {name}")
        if not TYPES[kind](schema.field(name).type):
            raise TypeError(f"column {name} is {schema.field(name).type}, not {kind}")


def require_values(table: pa.Table, columns: list[str]) -> None:
    """Raise `TypeError` if a value is missing in one of the columns, or in a list of it.

    Text that is no UTF-8 raises Arrow's error: its readers take text as it is.
    """
    for name in columns:
        column = table[name]
        column.validate(full=True)
        values = pc.list_flatten(column) if pa.types.is_list(column.type) else column
        if column.null_count or values.null_count:
            raise TypeError(f"a value of column {name} is missing")


def read_parquet(uri: str, columns: Mapping[str, str], what: str, others: bool = False) -> pa.Table:
    """Return columns of the Parquet file at `uri`; `UserError` as `input_errors(uri, what)`.

    Args:
        uri: path or URI.
        columns: by name, with their types, each one of `TYPES`.
        what: see `input_errors`.
        others: whether the file's other columns are read too.
    """
    with storage.open_file(uri) as file, input_errors(uri, what):
        # Not pq.read_table: on an open file it leaves threads that abort the process at its exit
        # (pyarrow 25).
        parquet = pq.ParquetFile(file)
        require_columns(parquet.schema_arrow, columns)
        table = parquet.read(columns=None if others else list(columns))
        table.validate(full=True)
        return table
