"""A run on an MLflow server that may be away: training waits for it at the start and at the end,
never in between.

Points of curves wait in memory and go to the server on a thread, in order, again until they have
arrived. A checkpoint keeps those that may not have: a resumed run sends them again, with their
times, by which MLflow knows a point that it has. So none is lost by an outage, a kill, or both.
"""

import importlib.util
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Self, TypeVar

from model_lib.errors import WorkError, first_line, printable
from model_lib.io.retries import retry
from model_lib.tracking.runs import Point, Run

log = logging.getLogger(__name__)
_Answer = TypeVar("_Answer")
INTERVAL, LONGEST_PAUSE = 5.0, 60.0
"""Seconds between two sendings: as a rule, and at most while they fail."""
AT_ONCE = 500
"""Points; a server takes at most 1,000 a call."""
AT_START = 10.0
"""Seconds for which a server that fails at the start is asked again: a wrong address is told at
once."""
FAIL_FAST = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}


@contextmanager
def failing_fast() -> Iterator[None]:
    """Let MLflow's client, which asks again for minutes, fail within seconds in the body, unless
    the user set it.

    It takes that from the environment alone.
    """
    ours = {name: value for name, value in FAIL_FAST.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def answered(uri: str, action: Callable[[], _Answer]) -> _Answer:
    """Return what `action` has from the server at `uri`; what that fails with is raised within
    seconds."""
    with failing_fast():
        return retry(printable(f"MLflow at {uri}"), action, AT_START)


def asked(uri: str, action: Callable[[], _Answer]) -> _Answer:
    """Return what `action` has from the server at `uri`; `WorkError` within seconds if it does not
    answer."""
    try:
        return answered(uri, action)
    except Exception as error:
        raise WorkError(
            f"MLflow at {uri}: fails ({reason(error)}); see to the server or to "
            "MLFLOW_TRACKING_URI and start again: "
            "nothing was done"
        ) from error


def reason(error: Exception) -> str:
    """Return why a call failed, without urllib3's wrapping."""
    text = printable(first_line(error))
    return text.rpartition(": ")[2].rstrip("')\"") if "Caused by" in text else text


class MlflowRun(Run):
    """A run on a tracking server.

    Args:
        client: of the server.
        run_id: of the run, which is there.
        params, tags: what it gets when it begins.
        finished: whether it has finished before; then it stays as it is, unless something more is
            logged.
    """

    def __init__(
        self,
        client: Any,
        run_id: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        finished: bool = False,
    ) -> None:
        self.client, self.run_id = client, run_id
        self.params, self.tags, self.finished = params, tags, finished
        self.waiting: list[
            Point
        ] = []  # appended to by training and emptied by the thread, each in one operation
        self.clock = 0
        self.ending = threading.Event()
        self.sender: threading.Thread | None = None
        self.monitor: Any = None
        self.held = ExitStack()

    def __enter__(self) -> Self:
        if not self.finished:
            self._begin()
        return self

    def _begin(self) -> None:
        self.finished = False
        asked(self.client.tracking_uri, self._open)
        self.held.enter_context(failing_fast())
        # A daemon: what hangs in a call must not keep the process from ending.
        self.sender = threading.Thread(target=self._keep_sending, name="mlflow", daemon=True)
        self.sender.start()
        if importlib.util.find_spec("psutil") is None:
            log.warning("the machine's load is not logged: pip install psutil")
            return
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        logging.getLogger("mlflow.system_metrics").setLevel(
            logging.ERROR
        )  # else it warns that there is no GPU
        self.monitor = SystemMetricsMonitor(
            self.run_id, resume_logging=True, tracking_uri=self.client.tracking_uri
        )
        self.monitor.start()

    def _open(self) -> None:
        from mlflow.entities import Param, RunTag

        self.client.update_run(self.run_id, status="RUNNING")
        self.client.log_batch(
            self.run_id,
            params=[Param(name, str(value)[:6000]) for name, value in self.params.items()],
            tags=[RunTag(name, value) for name, value in self.tags.items()],
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if self.finished:
            self._begin()
        # A clock that is set back would let older points pass for newer ones.
        self.clock = max(self.clock, int(time.time() * 1000))
        self.waiting += [(name, float(value), self.clock, step) for name, value in metrics.items()]

    def _keep_sending(self) -> None:
        pause, outage = INTERVAL, False
        while not self.ending.wait(pause):
            try:
                self._send()
            except Exception as error:
                if not outage:
                    where, why = printable(self.client.tracking_uri), reason(error)
                    log.warning(
                        "MLflow at %s: fails (%s); training goes on, and its points are kept",
                        where,
                        why,
                    )
                outage, pause = True, min(2 * pause, LONGEST_PAUSE)
            else:
                if outage:
                    log.warning(
                        "MLflow at %s: answers again; all points have arrived",
                        printable(self.client.tracking_uri),
                    )
                outage, pause = False, INTERVAL

    def _send(self) -> None:
        from mlflow.entities import Metric

        while points := self.waiting[:AT_ONCE]:
            self.client.log_batch(self.run_id, metrics=[Metric(*point) for point in points])
            del self.waiting[: len(points)]

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self.finished:
            return
        stopped = kind is not None and not issubclass(kind, Exception)
        status = "KILLED" if stopped else "FAILED" if kind else "FINISHED"
        uri = self.client.tracking_uri

        def end() -> None:
            self._send()
            self.client.set_terminated(self.run_id, status)

        self.ending.set()
        with self.held:
            if self.sender is not None:
                self.sender.join()
            if self.monitor is not None:
                self.monitor.finish()
            try:
                if kind is None:
                    retry(printable(f"MLflow at {uri}"), end)
                else:
                    end()
            except Exception as error:
                if kind is not None:  # the body's reason is the one to raise
                    log.warning(
                        "MLflow at %s: the run was not ended there (%s)",
                        printable(uri),
                        reason(error),
                    )
                    return
                raise WorkError(
                    f"MLflow at {uri}: fails ({reason(error)}); the training is done and its "
                    "model is safe, but "
                    f"{len(self.waiting)} points of run {self.run_id} were not sent; the same "
                    "command sends them"
                ) from error
