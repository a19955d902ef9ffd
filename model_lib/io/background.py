"""One thread for work beside the main thread's."""

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

from model_lib.errors import first_line

log = logging.getLogger(__name__)


class Background:
    """Runs one function at a time on a thread; the next call raises its failure.

    As a context it waits for the function, also if the body raises.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "background")
        self._work: Future[None] | None = None

    @property
    def busy(self) -> bool:
        return self._work is not None and not self._work.done()

    def start(self, work: Callable[[], None]) -> None:
        self.wait()
        self._work = self._thread.submit(work)

    def check(self) -> None:
        """Raise the failure of work that has ended, without waiting."""
        if not self.busy:
            self.wait()

    def wait(self) -> None:
        work, self._work = self._work, None
        if work is not None:
            work.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            self.wait()
        except Exception as error:
            if kind is None:
                raise
            log.warning("%s", first_line(error))  # the body's own error is raised
        finally:
            self._thread.shutdown()
