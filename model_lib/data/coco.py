"""COCO's lists of images and captions, read as a stream: memory holds what is used alone."""

import codecs
import re
from collections.abc import Iterator
from functools import partial
from typing import IO, Any, TypeVar

import ijson

from model_lib.errors import UserError, first_line
from model_lib.io.errors import input_errors
from model_lib.io.remote_cache import local_file

CHUNK = 2**16
"""Bytes that are parsed at once."""
LONGEST_VALUE = 16 * 2**20
"""Bytes of a text or a number, which the parser holds whole."""
DEEPEST = 32
"""Lists and objects inside each other; COCO's own files have 4."""
FORM = (
    'COCO captions; expected {"images": [{"id", "file_name"}], "annotations": [{"id", "image_id", '
    '"caption"}]}'
)
SURROGATES = re.compile("[\ud800-\udfff]")
"""Halves of surrogate pairs, which JSON can write and no file can hold."""
T = TypeVar("T")


def read_captions(uri: str) -> tuple[list[tuple[int, str]], dict[int, list[str]]]:
    """Read a COCO captions file.

    Args:
        uri: path or URI.

    Returns:
        The images (id, file name), and for each image id its captions in the order of their ids,
        each in one line, without empty ones.

    Raises:
        UserError: the file is missing, not JSON, or not COCO captions.
        WorkError: its store failed.
    """
    with local_file(uri) as path, path.open("rb") as file:
        images, captions = parse_captions(file, uri)
    lines = {
        image_id: [line for text in texts if (line := " ".join(text.split()))]
        for image_id, texts in captions.items()
    }
    return images, {image_id: [] for image_id, _ in images} | lines


def parse_captions(file: IO[bytes], uri: str) -> tuple[list[tuple[int, str]], dict[int, list[str]]]:
    """Return the images (id, file name) of a COCO captions file, and the captions of each image id
    in the order of their ids, as they are written.

    Raises:
        UserError: it is not JSON, or not COCO captions; the message names `uri`.
    """
    images: list[tuple[int, str]] = []
    rows: dict[int, list[tuple[int, str]]] = {}
    with input_errors(uri, FORM):
        for key, element in parse_lists(file, "images", "annotations"):
            if key == "annotations":
                row = (typed(element["id"], int), typed(element["caption"], str))
                rows.setdefault(typed(element["image_id"], int), []).append(row)
            elif "sentences" in element:
                raise UserError(f"{uri}: has Karpathy's splits; give it as --karpathy")
            else:
                images.append((typed(element["id"], int), typed(element["file_name"], str)))
    return images, {
        image_id: [text for _, text in sorted(texts, key=lambda row: row[0])]
        for image_id, texts in rows.items()
    }


def typed(value: Any, kind: type[T]) -> T:
    """Return a parsed value; `TypeError` if it is of another type."""
    if type(value) is not kind:
        raise TypeError(f"{value!r} is not {kind.__name__}")
    return value


def parse_lists(file: IO[bytes], *keys: str) -> Iterator[tuple[str, Any]]:
    """Yield the elements of the lists under `keys` of a JSON object, each with its key.

    Raises:
        ValueError: the document is not JSON, or its nesting or one of its values is too large.
        KeyError: a key is missing.
        TypeError: the value of a key is not a list.
    """
    missing = set(keys)
    key, depth = "", 0
    builder: ijson.ObjectBuilder | None = None
    for event, value in _events(file):
        if event in ("end_map", "end_array"):
            depth -= 1
        if depth == 1 and event == "map_key":
            key = value
        elif depth == 1 and key in keys and event != "end_array":
            if event != "start_array":
                raise TypeError(f"{key} is not a list")
            missing.discard(key)
        elif depth >= 2 and key in keys:
            builder = builder or ijson.ObjectBuilder()
            builder.event(event, value)
            if depth == 2 and not event.startswith("start"):
                yield key, builder.value
                builder = None
        if event in ("start_map", "start_array"):
            depth += 1
            if depth > DEEPEST:
                raise ValueError(f"more than {DEEPEST} lists and objects inside each other")
    if missing:
        raise KeyError(min(missing))


def _events(file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    """Yield ijson's events. Its parser replaces half a surrogate pair by a question mark."""
    events = ijson.sendable_list()
    parser = ijson.basic_parse_coro(events, use_float=True)
    waiting = 0
    try:
        parser.send(file.read(CHUNK).removeprefix(codecs.BOM_UTF8))
        for chunk in iter(partial(file.read, CHUNK), b""):
            yield from events
            waiting = 0 if events else waiting + len(chunk)
            if waiting > LONGEST_VALUE:
                raise ValueError(f"a value of more than {LONGEST_VALUE:,} bytes")
            events.clear()
            parser.send(chunk)
        parser.close()
    except ijson.JSONError as error:
        raise ValueError(first_line(error)) from error
    yield from events
