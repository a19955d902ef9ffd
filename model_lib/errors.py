"""The two exceptions that are meant for the user, each with one line that names the thing, the place and the remedy.

The command line prints the line and exits with 2 or 1; in a pipeline's step it is the last line of the log.
"""


class _OneLine(Exception):
    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class UserError(_OneLine):
    """Bad input or usage: exit code 2."""


class WorkError(_OneLine):
    """The input was fine, but the work failed: exit code 1."""


def exit_code(error: BaseException) -> int:
    """Return the exit code that an error stands for."""
    return 2 if isinstance(error, UserError) else 1


def first_line(error: Exception) -> str:
    """Return what an exception says, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]
