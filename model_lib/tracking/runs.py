"""Runs as training and evaluation see them; here without a tracking server."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from model_lib.errors import UserError, WorkError
from model_lib.tracking.metrics import MetricsFile

Values = Mapping[str, Any]
Tags = Mapping[str, str]


@dataclass(frozen=True)
class RunData:
    """A split of a data set, as the input of a run."""

    name: str
    digest: str
    """The data set's fingerprint."""
    uri: str
    """Of the manifest."""
    context: str
    """training or evaluation."""
    images: int


class Run:
    """A run whose points go to `metrics.jsonl` in its folder.

    Args:
        folder: the training's output, a path or URI; None: points go nowhere, as in all processes
            of a training but the first.
        step: at which the training starts, see `MetricsFile`.
    """

    run_id: str | None = None

    def __init__(self, folder: str | None = None, step: int = 0) -> None:
        self.folder, self.step = folder, step
        self.metrics: MetricsFile | None = None

    def __enter__(self) -> Self:
        if self.folder is not None:
            self.metrics = MetricsFile(self.folder, self.step)
        return self

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Add a point to each metric's curve."""
        if self.metrics is not None:
            self.metrics.append(metrics, step)

    def flush(self) -> None:
        """Write the points to the folder if that is in a bucket; call it before each checkpoint.

        What was logged before a checkpoint is not logged again by a training that resumes from it.
        """
        if self.metrics is not None:
            self.metrics.flush()

    def __exit__(self, kind: type | None, *_: object) -> None:
        """Close the run: finished, killed if the body was stopped, or failed if it raised.

        Raises:
            WorkError: the body ended well, but not all points could be sent.
        """
        try:
            self.flush()
        except (UserError, WorkError):
            if kind is None:  # else the body's own exception is the one to raise
                raise


class Tracking:
    """Where runs are tracked; this one has no server."""

    def require_answer(self) -> None:
        """Raise `WorkError` if the server does not answer, before any work is done."""

    def start(
        self,
        name: str,
        key: str | None,
        params: Values,
        tags: Tags,
        folder: str,
        step: int = 0,
        data: RunData | None = None,
        model: str | None = None,
    ) -> Run:
        """Start a run, or go on with the one that was started with the same key.

        Within a pipeline run it moves under that run's own, and is closed with it; unless it had
        finished, and nothing more is logged.

        Args:
            name: for people.
            key: by which the run is found again; None: always a new one.
            params: the configuration.
            tags: by name.
            folder: the training's output, see `Run`.
            step: at which the training starts.
            data: what it trains on.
            model: folder or URI of the best model once the run has finished.
        """
        return Run(folder, step)

    def finished_run(self, name: str, key: str | None = None) -> str | None:
        """Create a run for a model that was trained elsewhere, or find that of the same key; return
        its id, or None without a server."""
        return None

    def add(
        self,
        run_id: str,
        metrics: Mapping[str, float],
        tags: Tags,
        pages: Tags,
        data: RunData | None = None,
        model: str | None = None,
    ) -> None:
        """Add final metrics, tags and HTML pages (by path) to a run that has ended.

        Args:
            data: with which the metrics were measured.
            model: folder, URI or name of the run's model, to which the metrics belong.
        """


NO_TRACKING = Tracking()
