"""Lists of images: rows of CSV, JSON and Parquet, recognised by their content and read as a stream.

A list may be separated by commas, semicolons, tabs or bars; be an array of JSON objects, an object
with such an array under "data", one with names of images as keys, or JSON lines; or be Parquet. A
row that cannot be used is yielded with its problem, and the others go on.
"""

import contextlib
import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TextIO

import pyarrow.parquet as pq

from model_lib.data.captions import CONTROL, MARKS
from model_lib.data.coco import SURROGATES, parse_lists, parse_pairs
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
NUMBERED = re.compile(r"captions?[ _-]?\d+")
"""Names of columns with a caption each, if none of the above has captions."""
FLICKR = re.compile(r"(?<=\.jpg)#\d$")
"""The caption's number after a file's name, in the Flickr data sets' own lists."""
SEPARATOR = re.compile(r"sep=.\s*")
"""A first line with the delimiter, which spreadsheets write and read."""
QUOTED = re.compile(r'"((?:[^"]|"")*)"')
"""A cell in quotation marks."""
DELIMITERS = ",;\t|"
MOST_ROWS = 20
"""Lines of a cell that have as many fields as a row; more are rows after a quotation mark that is
not closed."""
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
"""How a text in UTF-16 begins: a spreadsheet's "Unicode text", or PowerShell's output."""
NOT_UTF_8 = "is not UTF-8; save the list in UTF-8"
NOT_CLOSED = "{uri}: line {line}: a quotation mark is not closed; close it, or remove it"
SHOWN = 200
"""Characters of a heading in a message."""
HEAD = 2**16
"""Bytes that tell a list's form."""
Form = Literal["coco", "json", "jsonl", "map", "parquet", "text", "zip", "tar", "gzip"]
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
    if head[257:262] == b"ustar" or head[:512] == bytes(512):  # one without members
        return "tar"
    text = head.decode("utf-8-sig", "replace").lstrip()
    if not text.startswith("{"):
        return "json" if text.startswith("[") else "text"
    with contextlib.suppress(ValueError, KeyError, TypeError):
        for key, _ in parse_lists(io.BytesIO(head), "images", "annotations", "data"):
            return "json" if key == "data" else "coco"
    with contextlib.suppress(ValueError, RecursionError):
        for name, value in parse_pairs(io.BytesIO(head)):
            own = ListColumns("", {}, ()).find(tuple(value)) if isinstance(value, dict) else {}
            if _may_be_image(name) or "caption" in own:
                return "map"
            break
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
            remedy = "name the folder of its images" if form == "coco" else "unpack it first"
            raise UserError(f"{uri}: is {form}, not a list of images that can be read; {remedy}")
        with input_errors(uri, "a list of images; it may be CSV, JSON, JSON lines or Parquet"):
            yield from READERS[form](path, columns)


class ListColumns:
    """Finds the columns that are used among those that a list has; arguments as `read_table`."""

    def __init__(self, uri: str, names: Mapping[str, str], need: Sequence[str]) -> None:
        self.uri, self.names, self.need = uri, names, need
        self.of: dict[tuple[str, ...], dict[str, list[str]]] = {}
        """The list's own names by ours, for each set of columns that rows have."""

    def find(self, columns: Sequence[str]) -> dict[str, list[str]]:
        """Return the list's own names by ours; those that are not there are left out. Only captions
        may be in several columns."""
        folded: dict[str, str] = {}
        for column in columns:
            folded.setdefault(column.strip().casefold(), column)
        own = {}
        for key, usual in COLUMNS.items():
            names = (self.names[key].strip().casefold(),) if key in self.names else usual
            if columns_there := [folded[name] for name in names if name in folded]:
                own[key] = columns_there[:1]
        numbered = [folded[name] for name in folded if NUMBERED.fullmatch(name)]
        if numbered and "caption" not in own and "caption" not in self.names:
            own["caption"] = numbered
        return own | {mark: [folded[mark]] for mark in MARKS if mark in folded}

    def require(self, columns: Sequence[str]) -> dict[str, list[str]]:
        """Return as `find`; `UserError` if a needed column is missing or there twice."""
        own = self.find(columns)
        stripped = [column.strip() for column in columns]
        for key in self.need:
            if key not in own:
                name = f"column {self.names[key]!r}" if key in self.names else f"{key} column"
                shown = CONTROL.sub("?", ", ".join(filter(None, stripped)))[:SHOWN] or "none"
                remedy = f"name it, for example --columns {','.join(f'{k}=…' for k in self.need)}"
                numbers = ", or give numbers from 1 if it has no heading"
                raise UserError(
                    f"{self.uri}: has no {name}; its columns are {shown}; {remedy}{numbers}"
                )
        for column in chain.from_iterable(own.values()):
            if stripped.count(column.strip()) > 1:
                raise UserError(f"{self.uri}: has several columns {column.strip()}; rename one")
        return own

    def pick(self, number: int, row: Any) -> TableRow:
        """Return what is used of an object of JSON."""
        if not isinstance(row, dict):
            return TableRow(number, problem="is not an object")
        key = tuple(row)
        if key not in self.of:
            self.of[key] = self.find(key)
        return TableRow(number, values_of(self.of[key], row))

    def require_any(self) -> None:
        """Raise as `require` if no object has had the needed columns: one without is a row's own
        problem."""
        if self.of and not any(own.keys() >= set(self.need) for own in self.of.values()):
            self.require(next(iter(self.of)))


def values_of(own: Mapping[str, Sequence[Any]], row: Any) -> dict[str, Any]:
    """Return what is used of a row: a cell, or the cells of several columns, by our names."""
    return {
        key: row[columns[0]] if len(columns) == 1 else [row[column] for column in columns]
        for key, columns in own.items()
    }


def _json(path: Path, columns: ListColumns) -> Iterator[TableRow]:
    with path.open("rb") as file:
        for number, (_, row) in enumerate(parse_lists(file, "data"), 1):
            yield columns.pick(number, row)
    columns.require_any()


def _map(path: Path, columns: ListColumns) -> Iterator[TableRow]:
    """Yield the rows of an object with names as keys, of captions or objects with captions."""
    with path.open("rb") as file:
        for number, (name, value) in enumerate(parse_pairs(file), 1):
            row = value if isinstance(value, dict) else {"caption": value}
            if "file" not in columns.find(tuple(row)):
                row = {"file": name} | row
            yield columns.pick(number, row)
    columns.require_any()


def _jsonl(path: Path, columns: ListColumns) -> Iterator[TableRow]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate((line for line in file if line.strip()), 1):
            try:
                row = columns.pick(number, json.loads(line))
                yield TableRow(number, problem=NOT_UTF_8) if SURROGATES.search(line) else row
            except ValueError as error:
                yield TableRow(number, problem=f"is not JSON: {error}")
    columns.require_any()


def _parquet(path: Path, columns: ListColumns) -> Iterator[TableRow]:
    number = 0
    with pq.ParquetFile(path) as table:
        own = columns.require(table.schema_arrow.names)
        for batch in table.iter_batches(columns=list(chain.from_iterable(own.values()))):
            for row in batch.to_pylist():
                number += 1
                yield TableRow(number, values_of(own, row))


def _text(path: Path, columns: ListColumns) -> Iterator[TableRow]:
    csv.field_size_limit(2**31 - 1)
    with path.open("rb") as file:
        encoding = "utf-16" if file.read(2) in UTF_16 else "utf-8-sig"
    with path.open(encoding=encoding, errors="surrogateescape", newline="") as text:
        skipped, first = 0, next((line for line in text if line.strip()), "")
        if SEPARATOR.fullmatch(first):
            skipped, first = 1, next(text, "")
        if SURROGATES.search(first):
            remedy = "save it as CSV in UTF-8, or give JSON or Parquet"
            raise UserError(f"{columns.uri}: is not a list in UTF-8; {remedy}")
        if encoding == "utf-16" and first.lstrip().startswith(("{", "[")):
            raise UserError(f"{columns.uri}: is JSON in UTF-16; save it in UTF-8")
        text.seek(0)
        for _ in range(skipped):
            text.readline()
        yield from _delimited(text, first, skipped, columns)


def _delimited(text: TextIO, first: str, skipped: int, columns: ListColumns) -> Iterator[TableRow]:
    """Yield the rows of a list whose first line with text is `first`, after `skipped` lines."""

    def fitness(delimiter: str) -> tuple[int, bool, int]:
        cells = _split(first, delimiter)
        return len(columns.find(cells)), _may_be_image(cells[0]), len(cells)

    delimiter = max(DELIMITERS, key=fitness)
    heading = _split(first, delimiter)
    if columns.need == ("file",) and _is_name(first, heading, columns):
        for number, line in enumerate(text, 1):
            if line.strip():
                yield TableRow(number, {"file": line.strip()})
        return
    own, has_heading = _positions(heading, columns)
    rows = _csv_rows(text, delimiter, len(heading), columns.uri, skipped)
    if delimiter == "\t" and _has_whole_lines(text, len(heading)):
        rows = _tab_rows(text)
    for number, row in enumerate(rows, 0 if has_heading else 1):
        if isinstance(row, str):
            yield TableRow(number, problem=row)
        elif any(map(SURROGATES.search, row)):
            yield TableRow(number, problem=NOT_UTF_8)
        elif number:  # 0 is the heading
            if not has_heading:
                row[0] = FLICKR.sub("", row[0])
            yield TableRow(number, values_of(own, row))


def _positions(heading: Sequence[str], columns: ListColumns) -> tuple[dict[str, list[int]], bool]:
    """Return the positions of the columns that are used, and whether the first row names them."""
    numbers = {key: [int(name) - 1] for key, name in columns.names.items() if name.isdecimal()}
    if max(chain.from_iterable(numbers.values()), default=-1) >= len(heading):
        raise ValueError(f"its first row has {len(heading)} columns")
    is_exact = len(heading) == len(columns.need)  # else its caption may be cut at a delimiter
    is_row = not columns.find(heading) and _may_be_image(heading[0])
    if not numbers and is_row and (is_exact or len(columns.need) == 1):
        numbers = {key: [number] for number, key in enumerate(columns.need)}
    if numbers:
        return numbers, False
    own = columns.require(heading)
    return {key: [heading.index(name) for name in names] for key, names in own.items()}, True


def _split(line: str, delimiter: str) -> list[str]:
    rows = csv.reader([line], delimiter=delimiter, skipinitialspace=True)
    return [cell.strip() for cell in next(rows, [""])] or [""]


def _is_name(line: str, cells: Sequence[str], columns: ListColumns) -> bool:
    """Return whether a line is a file's name, which may hold a delimiter, rather than a heading or
    cells of which the first is a name."""
    is_table = columns.uri.lower().endswith((".csv", ".tsv")) or columns.find(cells)
    if is_table or any(name.isdecimal() for name in columns.names.values()):
        return False
    return _has_ending(line.strip()) or not _has_ending(cells[0])


def _has_ending(cell: str) -> bool:
    return PurePosixPath(FLICKR.sub("", cell)).suffix.lower() in EXTENSIONS


def _may_be_image(cell: str) -> bool:
    return "://" in cell or _has_ending(cell)


def _has_whole_lines(text: TextIO, width: int) -> bool:
    """Return whether each line from here on has all fields, as when no cell has several lines."""
    start = text.tell()
    is_whole = all(line.count("\t") == width - 1 for line in text if line.strip())
    text.seek(start)
    return is_whole


def _tab_rows(text: TextIO) -> Iterator[list[str] | str]:
    """Yield the cells of rows of a line each, where a quotation mark is text unless a cell begins
    and ends with one."""
    for row in csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE):
        if row:
            matches = [QUOTED.fullmatch(cell) for cell in row]
            yield [m[1].replace('""', '"') if m else c for m, c in zip(matches, row, strict=True)]


def _csv_rows(
    text: TextIO, delimiter: str, width: int, uri: str, skipped: int
) -> Iterator[list[str] | str]:
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
                raise UserError(NOT_CLOSED.format(uri=uri, line=line + skipped)) from error
            yield f"{error} at a quotation mark"
            continue
        if reader.line_num > line and _has_rows_inside(row, delimiter, width):
            raise UserError(NOT_CLOSED.format(uri=uri, line=line + skipped))
        if not row:
            continue  # an empty line
        if len(row) == width:
            yield row
        else:
            remedy = f'put a text that holds "{delimiter}" in quotation marks'
            yield f"has {len(row)} fields under {width} headings; {remedy}"


def _has_rows_inside(row: Sequence[str], delimiter: str, width: int) -> bool:
    """Return whether lines inside a cell look like rows: with an image, or very many of them."""
    for cell in row:
        lines = cell.splitlines()[1:]
        rows = [cells for line in lines if len(cells := _split(line, delimiter)) == width]
        if len(rows) > MOST_ROWS or any(map(_may_be_image, chain.from_iterable(rows))):
            return True
    return False


READERS: dict[Form, Callable[[Path, ListColumns], Iterator[TableRow]]] = {
    "json": _json,
    "jsonl": _jsonl,
    "map": _map,
    "parquet": _parquet,
    "text": _text,
}
"""For each form of a list, the function that yields its rows."""
