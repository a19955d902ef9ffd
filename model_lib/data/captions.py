"""Which captions are used, of whatever list they come from."""

import ast
import contextlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

LONGEST_CAPTION = 1000
"""Characters of a caption; a longer text does not caption an image."""
CONTROL = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff]")
"""Control characters other than spaces, and halves of surrogate pairs, which no file can hold."""
NO_VALUE = frozenset(
    [
        *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND"),
        *("1.#QNAN", "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
    ]
)
"""Texts that spreadsheets and pandas write for an empty cell (pandas.read_csv, `na_values`)."""
WRITTEN_LIST = re.compile(r"""\[\s*(["'].*)?\]""", re.DOTALL)
"""A list that was written into a cell as text."""
MARKS = ("is_rejected", "is_precanned")
"""Columns by which a data set marks captions that are not to be used (VizWiz-Captions)."""


class UsableCaption(NamedTuple):
    """A caption in one line, or why there is none."""

    text: str = ""
    reason: str = ""
    """Empty: it can be used."""
    detail: str = ""
    is_cleaned: bool = False
    """Whether it lost control characters."""


def usable_caption(value: Any) -> UsableCaption:
    """Return a caption as it is used: in one line, without control characters."""
    if not has_value(value):
        detail = "a caption without a visible character" if value == "" else f"it is {value!r}"
        return UsableCaption(reason="caption_empty", detail=detail)
    if not isinstance(value, str):
        return UsableCaption(reason="caption_not_text", detail=f"it is {value!r:.60}")
    if WRITTEN_LIST.fullmatch(value.strip()):
        detail = f"it is a list written as text, {value!r:.60}"
        return UsableCaption(reason="caption_not_text", detail=detail)
    text = " ".join(CONTROL.sub("", value).split())
    if not any(map(str.isprintable, text.replace(" ", ""))):
        detail = "a caption without a visible character"
        return UsableCaption(reason="caption_empty", detail=detail)
    if len(text) > LONGEST_CAPTION:
        detail = f"{len(text):,} characters, more than {LONGEST_CAPTION:,}"
        return UsableCaption(reason="caption_too_long", detail=detail)
    return UsableCaption(text, is_cleaned=CONTROL.search(value) is not None)


def in_style(text: str, style: str) -> str:
    """Return a caption as it is learned.

    Args:
        text: the caption.
        style: "raw", as it is; "coco", in lower case, with single spaces and without its final
            stop, as COCO's scores read captions.
    """
    return text if style == "raw" else " ".join(text.lower().split()).rstrip(" .")


def captions_in(value: Any) -> list[Any]:
    """Return the captions of a cell: of one, of a list, or of a list that pandas or json wrote as
    text."""
    if isinstance(value, list):
        return value
    if isinstance(value, str) and WRITTEN_LIST.fullmatch(text := value.strip()):
        with contextlib.suppress(ValueError, RecursionError):
            return list(json.loads(text))
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            captions = ast.literal_eval(text)
            if str(captions) == text:  # else commas are missing, as numpy writes it
                return list(captions)
    return [value]


def has_value(value: Any) -> bool:
    """Return whether a cell holds something: neither null, nor NaN, nor a word for these."""
    if isinstance(value, float):
        return not math.isnan(value)
    return value is not None and not (isinstance(value, str) and value.strip() in NO_VALUE)


def marked_by(values: Mapping[str, Any]) -> str:
    """Return the name of the column that marks a caption as not to be used, or ""."""
    return next((mark for mark in MARKS if values.get(mark) in (True, "1", "true", "True")), "")
