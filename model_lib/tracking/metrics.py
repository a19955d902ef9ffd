"""`metrics.jsonl` in a training's output folder: every point of its curves.

A line for each step that was logged: {"step": 10, "time_ms": 1767225600000, "train_loss": 2.5}.
MLflow is sent its points from this file, and reports read it.
"""

import json
import tempfile
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from model_lib.io import storage
from model_lib.io.errors import input_errors, store_errors

NAME = "metrics.jsonl"
Point = tuple[str, float, int, int]
"""A metric's name, its value, milliseconds since 1970, and the step: as MLflow's `Metric`."""


class MetricsFile:
    """The metrics file of a training in progress.

    A local file is appended to. A bucket's file can only be replaced as a whole: its lines are kept
    in a local file, which `flush` uploads.

    Args:
        folder: the training's output, a path or URI.
        step: at which the training starts. Points after it are dropped: they are logged again.

    Raises:
        UserError: the file that is there holds something else.
    """

    def __init__(self, folder: str, step: int) -> None:
        self.uri = storage.join(folder, NAME)
        content = storage.read_bytes(self.uri) if storage.exists(self.uri) else b""
        lines = _whole_lines(content) if step > 0 else []
        with _format_errors(self.uri):
            rows = [(line, json.loads(line)) for line in lines]
            kept = [(line, row) for line, row in rows if row["step"] <= step]
            self.time_ms = max((row["time_ms"] for _, row in kept), default=0)
        start = b"".join(line for line, _ in kept)
        if storage.is_local(folder):
            self.path = Path(storage.filesystem(self.uri)[1])
            if start != content:
                storage.write_bytes(self.uri, start)
        else:
            self.scratch = tempfile.TemporaryDirectory()
            self.path = Path(self.scratch.name, NAME)
            self.path.write_bytes(start)

    def append(self, metrics: Mapping[str, float], step: int) -> None:
        # A clock that is set back would let older points pass for newer ones.
        self.time_ms = max(self.time_ms, int(time.time() * 1000))
        values = {name: float(value) for name, value in metrics.items()}
        line = json.dumps({"step": step, "time_ms": self.time_ms, **values})
        with store_errors(self.uri, "written"), self.path.open("a") as file:
            file.write(line + "\n")

    def flush(self) -> None:
        """Upload the file if it belongs into a bucket."""
        if not storage.is_local(self.uri):
            storage.write_bytes(self.uri, self.path.read_bytes())

    def read(self, offset: int) -> bytes:
        """Return whole lines from a position in the file on; b"" at its end."""
        if not self.path.exists():
            return b""
        with self.path.open("rb") as file:
            file.seek(offset)
            content = file.read()
        return content[: content.rfind(b"\n") + 1]


def parse_points(lines: bytes) -> list[Point]:
    """Return the points in lines of a metrics file."""
    points: list[Point] = []
    for line in lines.splitlines():
        row = json.loads(line)
        step, time_ms = int(row.pop("step")), int(row.pop("time_ms"))
        points += [(name, float(value), time_ms, step) for name, value in row.items()]
    return points


def read_curves(model: str) -> dict[str, list[tuple[int, float]]]:
    """Return the curves of the training that made a model: step and value, by metric.

    Args:
        model: the folder `best` in the training's output; {} for other models.
    """
    uri = storage.join(model.rstrip("/").rpartition("/")[0] or ".", NAME)
    if not storage.exists(uri):
        return {}
    content = storage.read_bytes(uri)
    with _format_errors(uri):
        points = parse_points(b"".join(_whole_lines(content)))
    curves: dict[str, dict[int, float]] = {}
    for name, value, _, step in points:
        curves.setdefault(name, {})[step] = value  # of a step that was logged twice, the last
    return {name: sorted(values.items()) for name, values in curves.items()}


def _format_errors(uri: str) -> AbstractContextManager[None]:
    return input_errors(uri, "the metrics of captioner train; remove it")


def _whole_lines(content: bytes) -> list[bytes]:
    """Return the lines of a metrics file; a kill may have cut the last one."""
    lines = content.splitlines(keepends=True)
    return lines[:-1] if lines and not lines[-1].endswith(b"\n") else lines
