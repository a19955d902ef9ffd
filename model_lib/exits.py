"""How a process ends: one line instead of a traceback, and SIGTERM heeded.

Exit codes: 0 done; 1 the work failed; 2 bad input or usage; 130 interrupted; 143 stopped by SIGTERM.
"""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from model_lib.errors import UserError, WorkError, first_line, printable

NO_MEMORY = (
    "can't allocate memory",  # torch
    "could not create a primitive",  # oneDNN, below torch
    "can't start new thread",  # Python
    "Cannot allocate memory",  # the system
    "out of memory",  # GPUs
)
"""How it is said that the memory is used up, in exceptions of other kinds than `MemoryError`."""


def _out_of_memory(error: Exception) -> NoReturn:
    said = f" ({printable(first_line(error))})" if str(error) else ""
    print(f"captioner: failed: the memory is used up{said}; give it more, or less to do at once", file=sys.stderr)
    sys.exit(1)


@contextmanager
def exit_in_one_line() -> Iterator[None]:
    """Exit with the line that is meant for the user when the body fails by their input, or by the world it works in."""
    try:
        yield
    except UserError as error:
        print(f"captioner: error: {error}", file=sys.stderr)
        sys.exit(2)
    except (WorkError, OSError) as error:
        print(f"captioner: failed: {printable(str(error))}", file=sys.stderr)
        sys.exit(1)
    except MemoryError as error:
        _out_of_memory(error)
    except Exception as error:
        if any(words in str(error) for words in NO_MEMORY):
            _out_of_memory(error)
        if not type(error).__module__.startswith(("mlflow.", "sqlalchemy.")):  # of a server, and of its own store
            raise
        print(printable(f"captioner: failed: MLflow: {' '.join(str(error).split())}"), file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


class Asked:
    """Whether the process was asked to end, by which signal, and how soon it does."""

    def __init__(self) -> None:
        self.signal = 0
        self.finishing = False
        """Whether what is being done is finished first; else the process ends at once."""

    def hear(self, number: int, *_: object) -> None:
        """Take a signal."""
        self.signal = number
        if not self.finishing:
            raise SystemExit(128 + number)

    @contextmanager
    def finishing_first(self) -> Iterator[None]:
        """Let the body look at `signal` and end in good order, instead of being interrupted."""
        self.finishing = True
        try:
            yield
        finally:
            self.finishing = False


@contextmanager
def heeding(*signals: signal.Signals) -> Iterator[Asked]:
    """Yield what tells whether one of the signals came, instead of their ending the process somewhere."""
    asked, before = Asked(), {}
    if threading.current_thread() is threading.main_thread():  # which alone can take signals
        before = {number: signal.signal(number, asked.hear) for number in signals}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
