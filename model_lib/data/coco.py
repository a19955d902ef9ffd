"""COCO's lists of images and captions, read as a stream: memory holds what is used alone."""

import codecs
import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import IO, Any, TypeVar

import ijson

from model_lib.data.captions import has_value, marked_by, usable_caption
from model_lib.errors import UserError, first_line
from model_lib.io.errors import input_errors
from model_lib.io.remote_cache import local_file

log = logging.getLogger(__name__)
CHUNK = 2**16
"""Bytes that are parsed at once."""
LONGEST_VALUE = 16 * 2**20
"""Bytes of a text or a number, which the parser holds whole."""
DEEPEST = 32
"""Lists and objects inside each other; COCO's own files have 4."""
FORM = (
    'COCO captions; expected {"images": [{"id", "file_name"}], "annotations": [{"image_id", '
    '"caption"}]}'
)
FILE_NAMES = ("file_name", "filename", "file", "path", "image", "coco_url", "url")
"""Keys of an image's file name or address; the first that it has."""
SURROGATES = re.compile("[\ud800-\udfff]")
"""Halves of surrogate pairs, which JSON can write and no file can hold."""
LARGEST_ID = 2**63 - 1
NAN = re.compile(rb"[:,\[]\s*-?(NaN|Infinity)\b")
STARTS, ENDS = ("start_map", "start_array"), ("end_map", "end_array")
"""ijson's events around what is in an object or a list."""
SHOWN = 60
"""Characters of a wrong value in a message."""
T = TypeVar("T")


@dataclass
class CocoCaptions:
    """The content of a COCO captions file."""

    images: list[tuple[int, str]] = field(default_factory=list)
    """Id and file name, or address; "" if it has none."""
    captions: dict[int, list[Any]] = field(default_factory=dict)
    """The captions of each image id, in the order of their own ids."""
    rejected: list[tuple[str, str]] = field(default_factory=list)
    """Reason and detail of each element that cannot be used."""


def read_captions(uri: str) -> tuple[list[tuple[int, str]], dict[int, list[str]]]:
    """Read a COCO captions file.

    Args:
        uri: path or URI.

    Returns:
        The images (id, file name), and for each image id its captions in the order of their ids,
        each in one line, without those that `usable_caption` refuses.

    Raises:
        UserError: the file is missing, not JSON, or not COCO captions.
        WorkError: its store failed.
    """
    with local_file(uri) as path, path.open("rb") as file:
        listed = parse_captions(file, uri)
    captions: dict[int, list[str]] = {image_id: [] for image_id, _ in listed.images}
    reasons = Counter(reason for reason, _ in listed.rejected)
    for image_id, texts in listed.captions.items():
        usable = [usable_caption(text) for text in texts]
        captions[image_id] = [caption.text for caption in usable if not caption.reason]
        reasons.update(caption.reason for caption in usable if caption.reason)
    if reasons:
        counts = ", ".join(f"{reason}: {count}" for reason, count in sorted(reasons.items()))
        log.warning("%s: left out as unusable: %s", uri, counts)
    return listed.images, captions


def parse_captions(
    file: IO[bytes], uri: str, names: Mapping[str, str] | None = None
) -> CocoCaptions:
    """Return the content of a COCO captions file.

    Args:
        file: its content.
        uri: where it is from.
        names: the file's own keys for "file", an image's name, and "caption".

    Raises:
        UserError: it is not JSON, or not COCO captions; the message names `uri`.
    """
    names = names or {}
    file_names = (names["file"],) if "file" in names else FILE_NAMES
    caption = names.get("caption", "caption")
    listed = CocoCaptions()
    rows: dict[int, list[tuple[Any, Any]]] = {}
    keys: set[str] = set()
    with input_errors(uri, FORM):
        for number, (key, element) in enumerate(parse_lists(file, "images", "annotations")):
            if not key:
                raise TypeError("is a list")
            kind = "image" if key == "images" else "annotation"
            try:
                if not isinstance(element, dict):
                    raise ValueError("is not an object")
                if key == "images":
                    if "sentences" in element:
                        raise UserError(f"{uri}: has Karpathy's splits; give it as --karpathy")
                    name = next((v for k in file_names if has_value(v := element.get(k))), "")
                    listed.images.append((image_id_of(element.get("id")), str(name)))
                    continue
                keys |= element.keys()
                image_id = image_id_of(element.get("image_id"))
            except ValueError as error:
                shown = json.dumps(element, default=str, ensure_ascii=False)[:SHOWN]
                listed.rejected.append(("bad_row", f"{kind} {shown}: {error}"))
                continue
            if mark := marked_by(element):
                listed.rejected.append(("caption_rejected", f"image id {image_id}: {mark}"))
                continue
            texts = element.get(caption)
            order = element.get("id") if type(element.get("id")) is int else number
            for text in texts if isinstance(texts, list) else [texts]:
                rows.setdefault(image_id, []).append((order, text))
        if keys and caption not in keys:
            columns = ", ".join(sorted(keys))
            raise UserError(f"{uri}: its annotations have no {caption}, only {columns}")
    for image_id, texts in rows.items():
        texts.sort(key=lambda row: row[0])
        listed.captions[image_id] = [text for _, text in texts]
    return listed


def image_id_of(value: Any) -> int:
    """Return an image's id as int64: of a text without a number, 53 bits of its digest.

    Raises:
        ValueError: it is missing, or not an id.
    """
    if isinstance(value, float) and value.is_integer():  # of a column of pandas with gaps
        value = int(value)
    if isinstance(value, str) and has_value(value):
        value = int(value) if value.isdecimal() and len(value) < 19 else name_id(value)
    if type(value) is not int or abs(value) > LARGEST_ID:
        raise ValueError(f"its image id is {json.dumps(value, default=str)[:SHOWN]}")
    return value


def name_id(name: str) -> int:
    """Return 53 bits of a name's digest, which a float of JSON's readers holds exactly."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8]) >> 11


def typed(value: Any, kind: type[T]) -> T:
    """Return a parsed value; `TypeError` if it is of another type."""
    if type(value) is not kind:
        raise TypeError(f"{value!r} is not {kind.__name__}")
    return value


def parse_lists(file: IO[bytes], *keys: str) -> Iterator[tuple[str, Any]]:
    """Yield the elements of the lists under `keys` of a JSON object, each with its key; or those of
    the document itself, if it is a list, with "".

    Raises:
        ValueError: the document is not JSON, or its nesting or one of its values is too large.
        KeyError: a key is missing.
        TypeError: the value of a key is not a list.
    """
    if _holds_nan(file):
        yield from _elements(json.load(file), keys)
        return
    missing = set(keys)
    key, inside = "", 2
    builder: ijson.ObjectBuilder | None = None
    for depth, event, value in _events(file):
        if depth == 0 and event == "start_array":
            keys, missing, inside = ("",), set(), 1
        elif depth == 1 and event == "map_key":
            key = value
        elif depth == 1 and inside == 2 and key in keys and event != "end_array":
            if event != "start_array":
                raise TypeError(f"{key} is not a list")
            missing.discard(key)
        elif depth >= inside and key in keys:
            builder = builder or ijson.ObjectBuilder()
            builder.event(event, value)
            if depth == inside and event not in STARTS:
                yield key, builder.value
                builder = None
    if missing:
        raise KeyError(min(missing))


def parse_pairs(file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    """Yield the keys of a JSON object with their values; `ValueError` as `parse_lists`."""
    if _holds_nan(file):
        yield from json.load(file).items()
        return
    key = ""
    builder: ijson.ObjectBuilder | None = None
    for depth, event, value in _events(file):
        if depth == 1 and event == "map_key":
            key, builder = value, ijson.ObjectBuilder()
        elif builder is not None:
            builder.event(event, value)
            if depth == 1 and event not in STARTS:
                yield key, builder.value
                builder = None


def _holds_nan(file: IO[bytes]) -> bool:
    """Return whether a document may have NaN for a missing value, as pandas and json.dump write it:
    it is no JSON, and ijson does not take it."""
    last = b""
    for chunk in iter(partial(file.read, CHUNK), b""):
        if NAN.search(last + chunk):
            break
        last = chunk[-32:]
    else:
        chunk = b""
    file.seek(0)
    return bool(chunk)


def _elements(document: Any, keys: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yield what `parse_lists` does of a document that is read whole."""
    if isinstance(document, list):
        document, keys = {"": document}, ("",)
    for key in keys:
        if not isinstance(document[key], list):
            raise TypeError(f"{key} is not a list")
        yield from ((key, element) for element in document[key])


def _events(file: IO[bytes]) -> Iterator[tuple[int, str, Any]]:
    """Yield the events of `_parse`, each with the number of lists and objects around it."""
    depth = 0
    for event, value in _parse(file):
        depth -= event in ENDS
        yield depth, event, value
        depth += event in STARTS
        if depth > DEEPEST:
            raise ValueError(f"more than {DEEPEST} lists and objects inside each other")


def _parse(file: IO[bytes]) -> Iterator[tuple[str, Any]]:
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
        yield from events  # of what is before it
        raise ValueError(first_line(error)) from error
    yield from events
