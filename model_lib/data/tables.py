"""Lists of images: rows of CSV, JSON and Parquet, told by their content and read as a stream.

A list may be separated by commas, semicolons, tabs or bars; be an array of JSON objects, an object
with such an array under "data", or JSON lines; or be Parquet. A row that cannot be used is yielded
with its problem, and the others go on.
"""

import contextlib
import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TextIO

import pyarrow.parquet as pq

from model_lib.data.captions import MARKS
from model_lib.data.coco import parse_lists
from model_lib.errors import UserError
from model_lib.io.errors import input_errors
from model_lib.io.images import EXTENSIONS
from model_lib.io.remote_cache import local_file
from model_lib.options import require

FILE_NAMES = (
    *("file", "file_name", "image", "filename", "path", "url", "uri"),
    *("image_name", "image_path", "file_path", "filepath", "image_url", "coco_url"),
)
COLUMNS = {
    "file": FILE_NAMES,
    "caption": ("caption", "text", "captions", "comment", "caption_str", "sentence", "sentences"),
    "split": ("split",),
}
"""Names of the columns that hold a row's image, captions and split; the first that is there."""
DELIMITERS = ",;\t|"
LONGEST_CELL = 20
"""Lines of a caption; more are rows after a quotation mark that is not closed."""
NOT_CLOSED = "{uri}: line {line}: a quotation mark is not closed; close it, or remove it"
HEAD = 2**16
"""Bytes that tell a list's form."""
Form = Literal["coco", "json", "jsonl", "parquet", "text", "zip", "tar", "gzip"]
MAGIC: dict[bytes, Form] = {b"PAR1": "parquet", b"PK": "zip", b"\x1f\x8b": "gzip"}
"""The first bytes of a file of each form."""


@dataclass(frozen=True)
class TableRow:
    """A row of a list."""

    number: int
    """From 1, without the heading."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """By the keys of `COLUMNS` and `MARKS` that the list has."""
    problem: str = ""
    """Why the row cannot be used."""


def parse_columns(columns: str | None, known: Sequence[str] = tuple(COLUMNS)) -> dict[str, str]:
    """Return an option `file=photo,caption=title` as a dictionary; `UserError` if it is none."""
    names = {}
    for part in filter(None, (columns or "").split(",")):
        key, equals, name = (text.strip() for text in part.partition("="))
        forms = " or ".join(f"{key}=…" for key in known)
        require(bool(key in known and equals and name), f"columns {part!r}: write {forms}")
        names[key] = name
    positions = [int(name) for name in names.values() if name.isdecimal()]
    is_either = not positions or (len(positions) == len(names) and min(positions) > 0)
    require(is_either, f"columns {columns}: give names, or numbers from 1")
    return names


def form_of(head: bytes) -> Form:
    """Return the form of a list or archive by its first `HEAD` bytes."""
    for start, form in MAGIC.items():
        if head.startswith(start):
            return form
    if head[257:262] == b"ustar":
        return "tar"
    text = head.decode("utf-8-sig", "replace").lstrip()
    if not text.startswith("{"):
        return "json" if text.startswith("[") else "text"
    with contextlib.suppress(ValueError, KeyError, TypeError):
        for key, _ in parse_lists(io.BytesIO(head), "images", "annotations", "data"):
            return "json" if key == "data" else "coco"
    for line in text.splitlines()[:2]:  # one may be damaged
        with contextlib.suppress(ValueError, RecursionError):
            json.loads(line)
            return "jsonl"
    return "coco"


def read_table(
    uri: str, names: Mapping[str, str] | None = None, need: Sequence[str] = ("file", "caption")
) -> Iterator[TableRow]:
    """Yield the rows of the list at `uri`.

    Args:
        uri: path or URI.
        names: the list's own names for keys of `COLUMNS`. A number is the position, from 1, of a
            column of a list without a heading.
        need: the keys without which the list is refused.

    Raises:
        UserError: it is missing or damaged, a quotation mark in it is not closed, or none of its
            columns is a needed one.
    """
    columns = ListColumns(uri, names or {}, need)
    with local_file(uri) as path:
        with path.open("rb") as file:
            form = form_of(file.read(HEAD))
        if form not in READERS:
            raise UserError(f"{uri}: is {form}, not a list of images")
        with input_errors(uri, "a list of images; it may be CSV, JSON, JSON lines or Parquet"):
            yield from READERS[form](path, columns)


class ListColumns:
    """Finds the columns that are used among those that a list has; arguments as `read_table`."""

    def __init__(self, uri: str, names: Mapping[str, str], need: Sequence[str]) -> None:
        self.uri, self.names, self.need = uri, names, need
        self.of: dict[tuple[str, ...], dict[str, str]] = {}
        """The list's own names by ours, for each set of columns that rows have."""

    def find(self, columns: Sequence[str]) -> dict[str, str]:
        """Return the list's own names by ours; those that are not there are left out."""
        folded: dict[str, str] = {}
        for column in columns:
            folded.setdefault(column.strip().casefold(), column)
        own = {}
        for key, usual in COLUMNS.items():
            names = (self.names[key].strip().casefold(),) if key in self.names else usual
            if columns_there := [folded[name] for name in names if name in folded]:
                own[key] = columns_there[0]
        return own | {mark: folded[mark] for mark in MARKS if mark in folded}

    def require(self, columns: Sequence[str]) -> dict[str, str]:
        """Return as `find`; `UserError` if a needed column is missing or there twice."""
        own = self.find(columns)
        stripped = [column.strip() for column in columns]
        for key in self.need:
            if key not in own:
                name = f"column {self.names[key]!r}" if key in self.names else f"{key} column"
                shown = ", ".join(filter(None, stripped)) or "none"
                remedy = f"name it, for example --columns {','.join(f'{k}=…' for k in self.need)}"
                raise UserError(f"{self.uri}: has no {name}; its columns are {shown}; {remedy}")
        for column in own.values():
            if stripped.count(column.strip()) > 1:
                raise UserError(f"{self.uri}: has several columns {column.strip()}; rename one")
        return own

    def pick(self, number: int, row: Any) -> TableRow:
        """Return what is used of an object of JSON."""
        if not isinstance(row, dict):
            return TableRow(number, problem="is not an object")
        key = tuple(row)
        if key not in self.of:
            # The first row has the columns; one without them is that row's own problem.
            self.of[key] = self.find(key) if self.of else self.require(key)
        return TableRow(number, {name: row[column] for name, column in self.of[key].items()})


def _json(path: Path, columns: ListColumns) -> Iterator[TableRow]:
    with path.open("rb") as file:
        for number, (_, row) in enumerate(parse_lists(file, "data"), 1):
            yield columns.pick(number, row)


def _jsonl(path: Path, columns: ListColumns) -> Iterator[TableRow]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate((line for line in file if line.strip()), 1):
            try:
                yield columns.pick(number, json.loads(line))
            except ValueError as error:
                yield TableRow(number, problem=f"is not JSON: {error}")


def _parquet(path: Path, columns: ListColumns) -> Iterator[TableRow]:
    number = 0
    with pq.ParquetFile(path) as table:
        own = columns.require(table.schema_arrow.names)
        for batch in table.iter_batches(columns=list(own.values())):
            for row in batch.to_pylist():
                number += 1
                yield TableRow(number, {name: row[column] for name, column in own.items()})


def _text(path: Path, columns: ListColumns) -> Iterator[TableRow]:
    csv.field_size_limit(2**31 - 1)
    with path.open("rb") as file:
        is_utf16 = file.read(2) in (b"\xff\xfe", b"\xfe\xff")  # a spreadsheet's "Unicode text"
    with path.open(encoding="utf-16" if is_utf16 else "utf-8-sig", newline="") as text:
        first = next((line for line in text if line.strip()), "")
        text.seek(0)
        yield from _delimited(text, first, columns)


def _delimited(text: TextIO, first: str, columns: ListColumns) -> Iterator[TableRow]:
    """Yield the rows of a list whose first line with text is `first`."""

    def fitness(delimiter: str) -> tuple[int, bool, int]:
        cells = _split(first, delimiter)
        return len(columns.find(cells)), _may_be_image(cells[0]), len(cells)

    delimiter = max(DELIMITERS, key=fitness)
    heading = _split(first, delimiter)
    positions = {key: int(name) - 1 for key, name in columns.names.items() if name.isdecimal()}
    has_heading = not positions and bool(columns.find(heading))
    if not has_heading and not positions:
        if columns.need == ("file",) and _is_name(first, heading[0], columns.uri):
            for number, line in enumerate(text, 1):
                if line.strip():
                    yield TableRow(number, {"file": line.strip()})
            return
        if _may_be_image(heading[0]) and len(heading) >= len(columns.need):
            positions = {key: number for number, key in enumerate(columns.need)}
    if not positions:
        positions = {key: heading.index(name) for key, name in columns.require(heading).items()}
    elif max(positions.values()) >= len(heading):
        raise ValueError(f"its first row has {len(heading)} columns")
    rows = _csv_rows(text, delimiter, len(heading), columns.uri)
    for number, row in enumerate(rows, 0 if has_heading else 1):
        if isinstance(row, str):
            yield TableRow(number, problem=row)
        elif number:  # 0 is the heading
            yield TableRow(number, {key: row[column] for key, column in positions.items()})


def _split(line: str, delimiter: str) -> list[str]:
    return [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter), [""])] or [""]


def _is_name(line: str, cell: str, uri: str) -> bool:
    """Return whether a line without a heading is a file's name, which may hold a delimiter, rather
    than cells of which the first is one."""
    if uri.lower().endswith((".csv", ".tsv")):
        return False
    return _has_ending(line.strip()) or not _has_ending(cell)


def _has_ending(cell: str) -> bool:
    return PurePosixPath(cell).suffix.lower() in EXTENSIONS


def _may_be_image(cell: str) -> bool:
    return "://" in cell or _has_ending(cell)


def _csv_rows(text: TextIO, delimiter: str, width: int, uri: str) -> Iterator[list[str] | str]:
    """Yield each row's cells, or why it cannot be used; `UserError` at a quotation mark that is not
    closed, as the rows after it would be read as its text."""
    reader = csv.reader(text, delimiter=delimiter, skipinitialspace=True, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if reader.line_num > line or str(error) == "unexpected end of data":
                raise UserError(NOT_CLOSED.format(uri=uri, line=line)) from error
            yield f"{error} at a quotation mark"
            continue
        if reader.line_num > line and _has_rows_inside(row, delimiter, width):
            raise UserError(NOT_CLOSED.format(uri=uri, line=line))
        if not row:
            continue  # an empty line
        if len(row) == width:
            yield row
        else:
            remedy = f'put a text that holds "{delimiter}" in quotation marks'
            yield f"has {len(row)} fields under {width} headings; {remedy}"


def _has_rows_inside(row: Sequence[str], delimiter: str, width: int) -> bool:
    """Return whether lines inside a cell look like rows, or are more than any caption's."""
    for cell in row:
        lines = cell.splitlines()
        rows = [cells for line in lines[1:] if len(cells := _split(line, delimiter)) == width]
        if len(lines) > LONGEST_CELL or any(map(_may_be_image, chain.from_iterable(rows))):
            return True
    return False


READERS: dict[Form, Callable[[Path, ListColumns], Iterator[TableRow]]] = {
    "json": _json,
    "jsonl": _jsonl,
    "parquet": _parquet,
    "text": _text,
}
"""For each form of a list, the function that yields its rows."""
