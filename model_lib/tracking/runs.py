"""Runs as training and evaluation see them; here without a tracking server."""

from collections.abc import Callable, Mapping
from typing import Any, Self

from model_lib.errors import UserError, WorkError
from model_lib.tracking.metrics import MetricsFile

RunState = Callable[[str], str | None]
"""Returns the state of a pipeline run, given its id in Kubeflow, or None if Kubeflow does not know
it. Raises OSError if Kubeflow does not answer."""


def unknown_state(run_id: str) -> str | None:
    """Return None: a `RunState` where there is no Kubeflow to ask."""
    return None


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
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        folder: str,
        step: int = 0,
    ) -> Run:
        """Start a run, or go on with the one that was started with the same key.

        A run that a pipeline run goes on with moves under it, so that it is closed with it; unless
        it had finished, and nothing more is logged.

        Args:
            name: for people.
            key: by which the run is found again; None: always a new one.
            params: the configuration.
            tags: by name.
            folder: the training's output, see `Run`.
            step: at which the training starts.
        """
        return Run(folder, step)

    def add(
        self,
        run_id: str,
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
        files: Mapping[str, bytes],
    ) -> None:
        """Add final metrics, tags and files (content by path) to a run that has ended."""

    def open_pipeline(self, name: str, run_state: RunState = unknown_state) -> None:
        """Create the pipeline run's own run, unless it is there, and end those of pipeline runs
        that are over."""

    def conclude(self, metrics: Mapping[str, float], tags: Mapping[str, str], note: str) -> None:
        """Add the outcome to the pipeline run's own run; the note is Markdown."""

    def close_pipeline(self, succeeded: bool) -> str | None:
        """End the pipeline run's own run, and as failed those that its steps left open; return
        its address."""
        return None

    def parent(self) -> str | None:
        """Return the id of the pipeline run's own run, or None."""
        return None

    def succeeded(self) -> bool:
        """Return whether the pipeline run's own run was ended as succeeded."""
        return False

    def notified(self) -> str | None:
        """Return the outcome of the pipeline run that the webhook has accepted, or None."""
        return None

    def set_notified(self, state: str) -> None:
        """Remember the outcome that the webhook has accepted."""

    def run_url(self, run_id: str) -> str | None:
        """Return the address at which people see a run, or None."""
        return None


NO_TRACKING = Tracking()
