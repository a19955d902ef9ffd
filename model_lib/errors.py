"""The one exception that means "your input, not our code".

Everything a user can get wrong raises `UserError` with a single line that names the thing, the place and the
remedy. The process edge (command line, pipeline step) turns it into exit code 2 without a traceback.
"""


class UserError(Exception):
    """Bad input or usage; its message is one line for the user."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
