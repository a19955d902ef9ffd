"""What is read back from a file, checked before it is believed: JSON as a dataclass, Parquet with
the columns it needs.

Files come from buckets that others write to, from other versions and from disks that fail. What
they say decides which files are read and written next, so that a name in them is a name and no way
out of its folder.
"""

import contextlib
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import pyarrow as pa
import pyarrow.compute as pc

from model_lib.errors import UserError, first_line
from model_lib.io import storage

T = TypeVar("T")
LARGEST = 2**63
"""Whole numbers below this, and from minus this, are those that Parquet and other programs can
hold."""
Check = Callable[[pa.DataType], bool]


def parse(kind: type[T], document: Any) -> T:
    """Make a dataclass of a JSON object; `TypeError` names what is missing, unknown or of another
    type."""
    made: T = _value(kind, document, "")
    return made


def _value(kind: Any, value: Any, place: str) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return (
            None
            if value is None
            else _value(next(one for one in inner if one is not type(None)), value, place)
        )
    if is_dataclass(kind):
        return _record(kind, _of(dict, value, place), place)
    if origin is list:
        return [
            _value(inner[0], one, f"{place}[{n}]") for n, one in enumerate(_of(list, value, place))
        ]
    if origin is tuple:
        if len(_of(list, value, place)) != len(inner):
            raise TypeError(f"{place} has {len(value)} values and not {len(inner)}")
        return tuple(_value(one, given, place) for one, given in zip(inner, value, strict=True))
    if origin is dict:
        return {
            key: _value(inner[1], one, f"{place}.{key:.40}")
            for key, one in _of(dict, value, place).items()
        }
    if kind is float:
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not -1e300 < value < 1e300
        ):  # nor a NaN
            raise TypeError(f"{place} is {value!r:.60}, not a number")
        return float(value)
    if kind is int and (
        not isinstance(value, int) or isinstance(value, bool) or not -LARGEST <= value < LARGEST
    ):
        raise TypeError(f"{place} is {value!r:.60}, not a whole number of 64 bits")
    if kind is str:
        _of(str, value, place).encode()  # lone surrogates can be in no file's name and on no page
    return value


def _of(kind: type, value: Any, place: str) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{place or 'the document'} is {type(value).__name__}, not {kind.__name__}")
    return value


def _record(kind: Any, document: dict[str, Any], place: str) -> Any:
    kinds = get_type_hints(kind)
    known = {field.name: kinds[field.name] for field in fields(kind)}
    for name in document:
        if name not in known:
            raise TypeError(f"{place}.{name:.40} is unknown here".lstrip("."))
    return kind(
        **{
            name: _value(known[name], value, f"{place}.{name}".lstrip("."))
            for name, value in document.items()
        }
    )


def require_file_name(name: str) -> str:
    """Return the name of a file in the folder of the file that names it; `ValueError` if it is a
    way out of there."""
    if not name or name in (".", "..") or any(character in name for character in "/\\:\0"):
        raise ValueError(f"{name!r:.60} is not the name of a file beside it")
    return name


@contextlib.contextmanager
def input_errors(uri: str, what: str) -> Iterator[None]:
    """Raise a `UserError` that `uri` is not `what`, "something; remedy", when its content lets the
    body fail."""
    form, *remedy = what.split("; ")
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{uri}: no such file") from error
    except (
        pa.ArrowException,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        OverflowError,
    ) as error:
        raise UserError(
            "; ".join([f"{uri}: is not {form} ({first_line(error)})", *remedy])
        ) from error
    except (
        OSError
    ) as error:  # Parquet's reader says so what is wrong with a page, and gives it no number
        if error.errno is not None or not storage.is_local(uri):
            raise
        raise UserError(
            "; ".join([f"{uri}: is not {form} ({first_line(error)})", *remedy])
        ) from error


def _texts(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _lists(inner: Check) -> Check:
    return lambda kind: (
        (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and inner(kind.value_type)
    )


def _bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


KINDS: Mapping[str, Check] = {
    "whole number": pa.types.is_integer,
    "number": lambda kind: pa.types.is_floating(kind) or pa.types.is_integer(kind),
    "text": _texts,
    "bytes": _bytes,
    "list of texts": _lists(_texts),
    "list of bytes": _lists(_bytes),
}


def require_columns(schema: pa.Schema, wanted: Mapping[str, str]) -> None:
    """Raise `TypeError` unless there is each column once, of its kind, one of `KINDS`; others may
    be there too."""
    for name, kind in wanted.items():
        if schema.names.count(name) != 1:
            raise TypeError(f"has {schema.names.count(name) or 'no'} columns {name}")
        if not KINDS[kind](schema.field(name).type):
            raise TypeError(f"column {name} is {schema.field(name).type}, not {kind}")


def require_values(table: pa.Table, names: list[str]) -> None:
    """Raise `TypeError` if a value is missing in one of the columns, or in a list of it.

    A text that is no UTF-8 raises Arrow's error: readers of Parquet take texts as they are, and
    Python fails later.
    """
    for name in names:
        column = table[name]
        column.validate(full=True)
        lists = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
        if column.null_count or (lists and pc.list_flatten(column).null_count):
            raise TypeError(f"a value of column {name} is missing")
