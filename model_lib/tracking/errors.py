"""How MLflow fails: one line for the user, within seconds."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from model_lib.errors import WorkError, first_line, printable

T = TypeVar("T")
FAIL_FAST = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}
MISSING = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""Error codes for what is not there; the second is that of a missing alias."""
REMEDY = "see to the server or to MLFLOW_TRACKING_URI and start again: nothing was done"


@contextmanager
def fail_fast() -> Iterator[None]:
    """Let MLflow's client fail within seconds instead of minutes, unless the user set its patience.

    It reads that from the environment alone.
    """
    ours = {name: value for name, value in FAIL_FAST.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


@contextmanager
def mlflow_errors(uri: str, consequence: str = REMEDY) -> Iterator[None]:
    """Raise a failure of the tracking server at `uri` as a `WorkError`, within seconds.

    Args:
        uri: of the server, for the message.
        consequence: what the failure means for the user, and the remedy.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        with fail_fast():
            yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise WorkError(f"MLflow at {uri}: fails ({reason(error)}); {consequence}") from error


def find(question: Callable[[], T]) -> T | None:
    """Return the server's answer to a question, or None if it has no such thing."""
    from mlflow.exceptions import MlflowException

    try:
        return question()
    except MlflowException as error:
        if error.error_code not in MISSING:
            raise
        return None


def reason(error: Exception) -> str:
    """Return why a call failed, without urllib3's wrapping."""
    text = printable(first_line(error))
    return text.rpartition(": ")[2].rstrip("')\"") if "Caused by" in text else text
