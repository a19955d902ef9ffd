"""Transient errors are retried for a time, and others are raised at once."""

from collections.abc import Callable

import pytest
from gcsfs.retry import HttpError

from model_lib import UserError
from model_lib.errors import WorkError
from model_lib.io import storage


def failing(*errors: Exception) -> Callable[[], str]:
    """Return a function that raises these errors, one a call, and then returns."""
    left = list(errors)

    def answer() -> str:
        if left:
            raise left.pop(0)
        return "content"

    return answer


@pytest.fixture()
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between attempts, which nobody waits for."""
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    return pauses


def test_a_transient_error_is_retried(
    pauses: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    action = failing(ConnectionResetError("reset"), TimeoutError("slow"))
    assert storage.access("gs://bucket/file", action) == "content"
    assert len(pauses) == 2 and pauses[0] <= 1 and pauses[1] <= 2
    assert "gs://bucket/file: fails (TimeoutError: slow); next attempt" in caplog.text


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError("gone"), PermissionError("not yours"), OSError(28, "No space left")],
)
def test_a_lasting_error_is_raised_at_once(error: OSError, pauses: list[float]) -> None:
    with pytest.raises((UserError, WorkError), match="gs://bucket/file: ") as raised:
        storage.access("gs://bucket/file", failing(error))
    assert raised.value.__cause__ is error and not pauses


def test_a_one_line_error_is_raised_as_it_is(pauses: list[float]) -> None:
    error = UserError("gs://bucket/file: the server answers 404")
    error.__cause__ = HttpError({"code": 404})
    with pytest.raises(UserError) as raised:
        storage.access("gs://bucket/file", failing(error))
    assert raised.value is error and not pauses


def test_a_local_file_is_not_retried(pauses: list[float]) -> None:
    with pytest.raises(WorkError, match="file: cannot be read: ConnectionResetError"):
        storage.access("file", failing(ConnectionResetError()))
    assert not pauses


def test_retries_end_after_the_time_that_is_set(
    pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPTIONER_RETRY_SECONDS", "0")
    with pytest.raises(WorkError, match="ConnectionResetError: for ever"):
        storage.access("gs://bucket/file", failing(ConnectionResetError("for ever")))
    assert not pauses
    monkeypatch.setenv("CAPTIONER_RETRY_SECONDS", "10m")
    with pytest.raises(UserError, match="CAPTIONER_RETRY_SECONDS=10m: is not a number of seconds"):
        storage.access("gs://bucket/file", lambda: "content")
