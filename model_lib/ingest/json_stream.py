"""JSON documents too large to hold as objects: their top-level arrays, an element at a time."""

import io
import json
from collections.abc import Iterator
from typing import IO, Any

CHUNK = 2**20
"""Characters read at once."""
LARGEST = 16 * CHUNK
"""Characters of one value: elements of lists of images are much smaller, and it is read whole."""
_DECODER = json.JSONDecoder()


class NotJson(ValueError):
    """The document is not JSON, or not an object; says why."""


def sections(file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    """Yield each key of a JSON object with its value, or with an iterator over the elements if that
    is an array.

    What of an iterator was not consumed is skipped.

    Args:
        file: the document, in UTF-8.

    Raises:
        NotJson: while iterating, where the document is found to be damaged.
    """
    text = _Text(file)
    text.expect("{")
    while text.peek() != "}":
        key = text.value()
        if not isinstance(key, str):
            raise NotJson("an object's key is not text")
        text.expect(":")
        if text.peek() == "[":
            elements = text.elements()
            yield key, elements
            for _ in elements:
                pass
        else:
            yield key, text.value()
        if text.peek() != "}":
            text.expect(",")
    text.expect("}")
    if text.peek():
        raise NotJson("something follows the document's end")


class _Text:
    def __init__(self, file: IO[bytes]) -> None:
        self.file = io.TextIOWrapper(file, encoding="utf-8-sig")
        self.buffer, self.at = "", 0

    def more(self) -> bool:
        try:
            chunk = self.file.read(CHUNK)
        except UnicodeDecodeError as error:
            raise NotJson(str(error)) from error
        self.buffer, self.at = self.buffer[self.at :] + chunk, 0
        return bool(chunk)

    def peek(self) -> str:
        """Return the next character that is no space, or nothing at the end."""
        while True:
            while self.at < len(self.buffer):
                if self.buffer[self.at] not in " \t\n\r":
                    return self.buffer[self.at]
                self.at += 1
            if not self.more():
                return ""

    def expect(self, character: str) -> None:
        found = self.peek()
        if found != character:
            raise NotJson(
                f"expected {character!r} and found {found!r}"
                if found
                else f"ends before {character!r}"
            )
        self.at += 1

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.buffer, self.at)
            except json.JSONDecodeError as error:
                cut = error.pos > len(self.buffer) - 16 or error.msg.startswith("Unterminated")
                if cut and len(self.buffer) - self.at > LARGEST:
                    raise NotJson(f"a value of more than {LARGEST:,} characters") from error
                if not cut or not self.more():
                    raise NotJson(error.msg) from error
                continue
            except RecursionError as error:
                raise NotJson("nested too deeply") from error
            except ValueError as error:
                raise NotJson(str(error)) from error  # a number of thousands of digits
            if end < len(self.buffer) or not self.more():  # a number may go on in the next chunk
                self.at = end
                return value

    def elements(self) -> Iterator[Any]:
        self.expect("[")
        while self.peek() != "]":
            yield self.value()
            if self.peek() != "]":
                self.expect(",")
        self.expect("]")
