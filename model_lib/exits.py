"""The end of a process: one line instead of a traceback, and stop signals.

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
    "can't allocate memory",  # torch's allocator on the CPU
    "could not create a primitive",  # oneDNN
    "can't start new thread",  # Python
    "out of memory",  # CUDA libraries
)
"""Messages of exhausted memory in `RuntimeError`s, which have no type of their own."""
PACKAGES = {
    "PIL": "pillow",
    "cykooz_resizer": "cykooz-resizer",
    "prometheus_client": "prometheus-client",
}
"""Names of packages that are not those of their modules."""
MISTAKE = "captioner: error: "
"""Start of the line of a user's mistake; other failures start differently."""
LONGEST = 1000
"""Characters that go to the pod's status: Kubernetes cuts at 4,096 bytes."""
TERMINATION_LOG = Path("/dev/termination-log")
"""File of a Kubernetes container whose content the pod's status shows, and Argo's node."""


def _exit_line(error: Exception) -> tuple[int, str] | None:
    """Return the exit code and line for an exception; None for a defect of ours."""
    if isinstance(error, UserError):
        return 2, f"{MISTAKE}{error}"
    if isinstance(error, ModuleNotFoundError):
        module = (error.name or "").partition(".")[0]
        package = PACKAGES.get(module, module)
        return 2, f"{MISTAKE}needs {package}, which is not installed: pip install {package}"
    if isinstance(error, (WorkError, OSError)):
        return 1, f"captioner: failed: {printable(str(error))}"
    # torch.OutOfMemoryError is a RuntimeError, too.
    no_memory = isinstance(error, RuntimeError) and any(text in str(error) for text in NO_MEMORY)
    if no_memory or isinstance(error, MemoryError):
        reason = f" ({printable(first_line(error))})" if str(error) else ""
        return 1, f"captioner: failed: out of memory{reason}; use a larger machine, or less at once"
    if type(error).__module__.startswith(("mlflow.", "sqlalchemy.")):
        return 1, printable(f"captioner: failed: MLflow: {' '.join(str(error).split())}")
    return None


@contextmanager
def exit_in_one_line() -> Iterator[None]:
    """Exit with one line for the user if the body fails by their input, or by files and servers."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        end = _exit_line(error)
        if end is None:
            raise
        code, line = end
        print(line, file=sys.stderr)
        with suppress(OSError), TERMINATION_LOG.open("r+") as log:  # outside of a pod there is none
            log.seek(0, os.SEEK_END)  # other processes of the container write there too
            log.write(f"{line[:LONGEST]}\n")
        sys.exit(code)


class StopRequest:
    """The stop signal that the process has received, if any."""

    def __init__(self) -> None:
        self.signal = 0
        """Its number; 0: none."""
        self.deferred = False

    def on_signal(self, number: int, *_: object) -> None:
        """Handle a signal: note it, and exit unless the stop is deferred."""
        self.signal = number
        if not self.deferred:
            raise SystemExit(128 + number)

    @contextmanager
    def defer_stop(self) -> Iterator[None]:
        """Do not interrupt the body, which looks at `signal` and ends by itself."""
        self.deferred = True
        try:
            yield
        finally:
            self.deferred = False


@contextmanager
def catch_signals(*signals: signal.Signals) -> Iterator[StopRequest]:
    """Yield the request that these signals make, instead of their default action."""
    request, handlers = StopRequest(), {}
    if threading.current_thread() is threading.main_thread():  # the only one that may set handlers
        handlers = {number: signal.signal(number, request.on_signal) for number in signals}
    try:
        yield request
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
