"""Runs as training and evaluation see them: what takes curves, parameters and tags, or nothing at
all."""

from collections.abc import Callable, Mapping
from typing import Any, Self

Point = tuple[str, float, int, int]
"""A metric's name, its value, when it was measured (ms since 1970), and the step of training."""

RunState = Callable[[str], str | None]
"""Returns the state of a pipeline run, given Kubeflow's id of it, or None where that cannot be
known."""


def unknown_state(run_id: str) -> str | None:
    """Return None: a `RunState` where there is nobody to ask."""
    return None


class Run:
    """A run being tracked; this one tracks nothing."""

    run_id: str | None = None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Add a point to each metric's curve, without waiting for it to arrive; all have when the
        run is closed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        """Close the run: finished, killed if the body was stopped, or failed if it raised.

        Raises:
            WorkError: the body ended well, but not all points could be sent.
        """


class Tracking:
    """Where runs are tracked; this one is nowhere."""

    def require_answer(self) -> None:
        """Raise `WorkError` now if runs cannot be tracked, rather than after the data and the model
        were read."""

    def start(
        self,
        name: str,
        key: str | None,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        folder: str | None = None,
        step: int = 0,
    ) -> Run:
        """Start the run `name`, or go on with the one that was started with the same `key`, if
        there is a key.

        One that a pipeline run goes on with moves under it, so that it is closed with it; unless it
        had finished, and nothing more is logged.
        """
        return Run()

    def add(
        self,
        run_id: str,
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
        files: Mapping[str, bytes],
    ) -> None:
        """Add final metrics, tags and files (content by path) to a run that has ended."""

    def curves(self, run_id: str) -> dict[str, list[tuple[int, float]]]:
        """Return a run's curves of training, each its steps and values; {} if they cannot be
        had."""
        return {}

    def open_pipeline(self, name: str, run_state: RunState = unknown_state) -> None:
        """Make the pipeline run's own run, unless it is there, and end those of pipeline runs that
        are over."""

    def conclude(self, metrics: Mapping[str, float], tags: Mapping[str, str], note: str) -> None:
        """Say in the pipeline run's own run what came of it; the note is Markdown."""

    def close_pipeline(self, succeeded: bool) -> str | None:
        """End the pipeline run's own run, and as failed those that its steps left open; return
        where to see it."""
        return None

    def parent(self) -> str | None:
        """Return the pipeline run's own run, or None if there is none."""
        return None

    def succeeded(self) -> bool:
        """Return whether the pipeline run's own run was ended as succeeded."""
        return False

    def notified(self) -> str | None:
        """Return the outcome of the pipeline run that its webhook has taken, or None."""
        return None

    def set_notified(self, state: str) -> None:
        """Remember the outcome that the webhook has taken."""

    def run_url(self, run_id: str) -> str | None:
        """Return the address at which people see a run, or None if there is none."""
        return None


NO_TRACKING = Tracking()
