"""Which captions are used, of whatever list they come from."""

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
    text = " ".join(CONTROL.sub("", value).split())
    if not text:
        detail = "a caption without a visible character"
        return UsableCaption(reason="caption_empty", detail=detail)
    if len(text) > LONGEST_CAPTION:
        detail = f"{len(text):,} characters, more than {LONGEST_CAPTION:,}"
        return UsableCaption(reason="caption_too_long", detail=detail)
    return UsableCaption(text, is_cleaned=CONTROL.search(value) is not None)


def has_value(value: Any) -> bool:
    """Return whether a cell holds something: neither null, nor NaN, nor a word for these."""
    if isinstance(value, float):
        return not math.isnan(value)
    return value is not None and not (isinstance(value, str) and value.strip() in NO_VALUE)


def marked_by(values: Mapping[str, Any]) -> str:
    """Return the name of the column that marks a caption as not to be used, or ""."""
    return next((mark for mark in MARKS if values.get(mark) in (True, "1", "true", "True")), "")
