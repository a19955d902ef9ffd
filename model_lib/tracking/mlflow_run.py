"""A run on an MLflow server, which may be away while the training goes on.

Training waits for MLflow at the start and at the end. In between, one thread sends what is in
`metrics.jsonl` beyond a cursor, again until it has arrived. Each start sends the file from its
beginning: MLflow ignores a point that it has with the same time, so no point is lost or doubled by
an outage, a kill, or both.
"""

import importlib.util
import logging
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Self

from model_lib.errors import printable
from model_lib.io.retries import retry
from model_lib.tracking.errors import fail_fast, mlflow_errors, reason
from model_lib.tracking.metrics import parse_points
from model_lib.tracking.models import ensure_model, log_data
from model_lib.tracking.runs import Run, RunData, Tags, Values

log = logging.getLogger(__name__)
INTERVAL, LONGEST_PAUSE = 5.0, 60.0
"""Seconds between two uploads: as a rule, and at most while they fail."""


class MlflowRun(Run):
    """A run on a tracking server.

    Args:
        client: MLflow's.
        run_id: of the run, which exists.
        params, tags: set when the run begins.
        folder, step: see `Run`.
        finished: whether it had finished before; then it is left alone unless more is logged.
        data, model: see `Tracking.start`.
    """

    run_id: str

    def __init__(
        self,
        client: Any,
        run_id: str,
        params: Values,
        tags: Tags,
        folder: str,
        step: int,
        finished: bool = False,
        data: RunData | None = None,
        model: str | None = None,
    ) -> None:
        super().__init__(folder, step)
        self.data, self.model = data, model
        self.client, self.run_id = client, run_id
        self.params, self.tags, self.finished = params, tags, finished
        self.server = printable(client.tracking_uri)
        self.cursor = 0
        """Position in the metrics file up to which MLflow has it."""
        self.ending = threading.Event()
        self.monitor: Any = None
        self.stack = ExitStack()

    def __enter__(self) -> Self:
        super().__enter__()
        if not self.finished:
            self._begin()
        return self

    def _begin(self) -> None:
        from mlflow.entities import Param, RunTag

        params = [Param(name, str(value)) for name, value in self.params.items()]
        tags = [RunTag(name, value) for name, value in self.tags.items()]
        with mlflow_errors(self.server):
            self.client.update_run(self.run_id, status="RUNNING")
            self.client.log_batch(self.run_id, params=params, tags=tags)
            if self.data is not None:
                log_data(self.client, self.run_id, self.data)
        self.finished = False
        self.stack.enter_context(fail_fast())
        # A daemon: a call that hangs must not keep the process from ending.
        self.uploader = threading.Thread(target=self._keep_uploading, name="mlflow", daemon=True)
        self.uploader.start()
        if importlib.util.find_spec("psutil") is None:
            log.warning("the machine's load is not logged: pip install psutil")
            return
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        # It warns that there is no GPU.
        logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)
        self.monitor = SystemMetricsMonitor(
            self.run_id, resume_logging=True, tracking_uri=self.client.tracking_uri
        )
        self.monitor.start()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if self.finished:
            self._begin()
        super().log(metrics, step)

    def _keep_uploading(self) -> None:
        pause = INTERVAL
        while not self.ending.wait(pause):
            try:
                self._upload()
            except Exception as error:
                if pause == INTERVAL:
                    message = "MLflow at %s: fails (%s); training goes on, and its points are kept"
                    log.warning(message, self.server, reason(error))
                pause = min(2 * pause, LONGEST_PAUSE)
            else:
                if pause > INTERVAL:
                    log.warning("MLflow at %s: answers again; it has all points", self.server)
                pause = INTERVAL

    def _upload(self) -> None:
        from mlflow.entities import Metric

        assert self.metrics is not None
        lines = self.metrics.read(self.cursor)
        points = [Metric(*point) for point in parse_points(lines)]
        self.client.log_batch(self.run_id, metrics=points)  # at most 1,000 a request
        self.cursor += len(lines)

    def _end(self, status: str) -> None:
        self._upload()
        if self.model is not None and status == "FINISHED":
            ensure_model(self.client, self.run_id, self.model)
        self.client.set_terminated(self.run_id, status)

    def __exit__(self, kind: type | None, *_: object) -> None:
        super().__exit__(kind)
        if self.finished:
            return
        self.ending.set()
        with self.stack:
            self.uploader.join()
            if self.monitor is not None:
                self.monitor.finish()
            if kind is None:
                consequence = (
                    "the training is done and its model is safe, but not all points of run "
                    f"{self.run_id} were sent; the same command sends the rest"
                )
                with mlflow_errors(self.server, consequence):
                    retry(f"MLflow at {self.server}", lambda: self._end("FINISHED"))
                return
            try:
                self._end("FAILED" if issubclass(kind, Exception) else "KILLED")
            except Exception as error:  # the body's own exception is the one to raise
                message = "MLflow at %s: the run was not ended there (%s)"
                log.warning(message, self.server, reason(error))
