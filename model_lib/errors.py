"""The two exceptions for the user, each with one line that names the thing, the place and the
remedy.

The command line prints the line and exits with 2 or 1; in a pipeline's step it is the last line of
the log.
"""

import re

INVISIBLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Characters that control a terminal or the direction of text, and lone surrogates, which cannot be
printed."""
PASSWORD = re.compile(r"(://[^/\s:@]*:)[^/\s]+@")
"""The password of an address, which ends with the last @ before the path."""
LONGEST = 2000
"""Characters of a line; of a longer one, which quotes a whole file, start and end are shown."""


def printable(text: str) -> str:
    """Return a line without control characters, which file names can hold, and without passwords,
    which addresses can hold."""
    text = PASSWORD.sub(r"\1***@", text)
    return INVISIBLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class _OneLine(Exception):
    def __init__(self, message: str) -> None:
        line = " ".join(message.split())
        if len(line) > LONGEST:
            line = f"{line[: LONGEST // 2]} … {line[-LONGEST // 4 :]}"
        super().__init__(printable(line))


class UserError(_OneLine):
    """Bad input or usage: exit code 2."""


class WorkError(_OneLine):
    """The input was fine, but the work failed: exit code 1."""


def exit_code(error: BaseException) -> int:
    """Return the exit code of an error."""
    return 2 if isinstance(error, UserError) else 1


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
