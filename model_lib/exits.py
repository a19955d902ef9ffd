"""How a process ends: one line instead of a traceback, and SIGTERM heeded.

Exit codes: 0 done; 1 the work failed; 2 bad input or usage; 130 interrupted; 143 stopped by
SIGTERM.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from model_lib.errors import UserError, WorkError, first_line, printable

NO_MEMORY = (
    "can't allocate memory",  # torch
    "could not create a primitive",  # oneDNN, below torch
    "can't start new thread",  # Python
    "Cannot allocate memory",  # the system
    "out of memory",  # GPUs
)
"""How it is said that the memory is used up, in exceptions of other kinds than `MemoryError`."""


MISTAKE = "captioner: error: "
"""Beginning of the line that tells a mistake in the input or in the data; of other failures it is
another."""
LONGEST = 1000
"""Characters of it that a pod keeps: Kubernetes cuts at 4,096 bytes."""
TERMINATION_LOG = Path("/dev/termination-log")
"""Where a Kubernetes container leaves the reason of its end: the pod's status shows it, and Argo
its node's message."""


def _ending(error: Exception) -> tuple[int, str] | None:
    """Return the exit code and the line that an exception ends the process with, or None if it is a
    defect."""
    if isinstance(error, UserError):
        return 2, f"{MISTAKE}{error}"
    if isinstance(error, (WorkError, OSError)):
        return 1, f"captioner: failed: {printable(str(error))}"
    if isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY):
        reason = f" ({printable(first_line(error))})" if str(error) else ""
        return (
            1,
            (
                f"captioner: failed: the memory is used up{reason}; give it more, or less to do at "
                "once"
            ),
        )
    if type(error).__module__.startswith(
        ("mlflow.", "sqlalchemy.")
    ):  # of a server, and of its own store
        return 1, printable(f"captioner: failed: MLflow: {' '.join(str(error).split())}")
    return None


@contextmanager
def exit_in_one_line() -> Iterator[None]:
    """Exit with the line that is meant for the user when the body fails by their input, or by the
    world it works in."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        ending = _ending(error)
        if ending is None:
            raise
        code, line = ending
        print(line, file=sys.stderr)
        with (
            suppress(OSError),
            TERMINATION_LOG.open("r+") as log,
        ):  # where there is one, and it may be written
            log.seek(0, os.SEEK_END)  # after what other processes of this container say
            log.write(f"{line[:LONGEST]}\n")
        sys.exit(code)


class StopRequest:
    """Whether the process was asked to end, by which signal, and how soon it does."""

    def __init__(self) -> None:
        self.signal = 0
        self.finishing = False
        """Whether what is being done is finished first; else the process ends at once."""

    def on_signal(self, number: int, *_: object) -> None:
        """Take a signal."""
        self.signal = number
        if not self.finishing:
            raise SystemExit(128 + number)

    @contextmanager
    def defer_stop(self) -> Iterator[None]:
        """Let the body look at `signal` and end in good order, instead of being interrupted."""
        self.finishing = True
        try:
            yield
        finally:
            self.finishing = False


@contextmanager
def catch_signals(*signals: signal.Signals) -> Iterator[StopRequest]:
    """Yield what tells whether one of the signals came, instead of their ending the process
    somewhere."""
    request, before = StopRequest(), {}
    if threading.current_thread() is threading.main_thread():  # which alone can take signals
        before = {number: signal.signal(number, request.on_signal) for number in signals}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
