"""How a process ends: one line instead of a traceback, and SIGTERM heeded.

Exit codes: 0 done; 1 the work failed; 2 bad input or usage; 130 interrupted; 143 stopped by SIGTERM.
"""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from model_lib.errors import UserError, WorkError


@contextmanager
def one_line() -> Iterator[None]:
    """Exit with the line that is meant for the user when the body fails by their input, or by the world it works in."""
    try:
        yield
    except UserError as error:
        print(f"captioner: error: {error}", file=sys.stderr)
        sys.exit(2)
    except (WorkError, OSError) as error:
        print(f"captioner: failed: {error}", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        if not type(error).__module__.startswith("mlflow."):
            raise
        print(f"captioner: failed: MLflow: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


@contextmanager
def heeding_sigterm() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM sets, instead of ending the process."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # which alone can take signals
        yield asked
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)
