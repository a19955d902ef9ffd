"""What evaluating came to, and the folder that keeps it: a model's scores, and what it said of each
image.

The folder holds `results.json` (COCO's results format), `predictions.parquet`, `report.html` and,
written last, `scores.json`. From it candidates and champion are compared, without the models and
without what made the scores.
"""

import dataclasses
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from model_lib.errors import UserError
from model_lib.io import storage
from model_lib.io.errors import input_errors
from model_lib.io.validation import read_parquet, read_record, require_values
from model_lib.scores.significance import Comparison, Statistics

FEW_IMAGES = 100
"""On fewer, CIDEr means little: how rare a word is, is counted in their references."""
MAIN = "CIDEr"
COLUMNS = {
    "image_id": "int",
    "file_name": "text",
    "caption": "text",
    "references": "list of text",
    "thumbnail": "bytes",
    "words": "list of text",
    "attention": "list of bytes",
}
"""Of predictions.parquet, besides a column for each score."""
COUNTS = "counts of "
"""Before the names of columns that hold a score's counts."""


@dataclass(frozen=True)
class Evaluation:
    """What `scores.json` says: scores, and everything that must agree before two of them may be
    compared."""

    name: str
    model: str
    """Where the model lies, or the results file."""
    split: str
    """Of the data, or the annotations that the captions were scored against."""
    images: int
    scores: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    """Each score's 95 % interval, by bootstrap over the images."""
    shuffled_cider: float
    """What a model that never looks would get."""
    frequencies: str
    """In which captions CIDEr counts how rare an n-gram is."""
    diversity: dict[str, float]
    """What the captions are like as a whole: see `diversity.describe`."""
    tokenizer: str
    missing: dict[str, str]
    """Scores that could not be computed, and why."""
    decoding: dict[str, Any]
    images_per_second: float | None = None
    """Of captioning decoded images, without scoring."""
    clip: str | None = None
    """The CLIP of CLIPScore."""
    data_fingerprint: str | None = None
    mlflow_run_id: str | None = None
    packages: dict[str, str] = field(default_factory=dict)
    """Versions of the packages with which the model captioned."""
    weights: str | None = None
    """Digest of a model in a folder, where other weights may lie later: see
    `sources.weights_digest`."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def figures(self) -> dict[str, float]:
        """Return all that is known as a number, by the name under which a tracking server shows
        it."""
        found = {**self.scores, f"{MAIN}_shuffled": self.shuffled_cider}
        found |= {f"diversity_{name}": value for name, value in self.diversity.items()}
        if self.images_per_second is not None:
            found["images_per_second"] = self.images_per_second
        return found

    @classmethod
    def read(cls, folder: str) -> Self:
        """Read the scores in `folder`; `UserError` if there are none."""
        what = "what this captioner evaluate writes; evaluate again"
        return read_record(storage.join(folder, "scores.json"), cls, what)


@dataclass(frozen=True)
class View:
    """An image for the report."""

    thumbnail: bytes
    """A small JPEG of the whole image."""
    words: list[tuple[str, np.ndarray]] = field(default_factory=list)
    """The caption's words, and where the model looked for each: uint8 [P, P] over the centre
    square."""


@dataclass(frozen=True)
class Predictions:
    """What was said of each image, in the order of the ids."""

    image_ids: list[int]
    file_names: list[str]
    captions: list[str]
    references: list[list[str]]
    statistics: Statistics
    """For each score its counts, float64 [images, counts]."""
    views: Mapping[int, View] = field(default_factory=dict)
    """Of some images, by id."""

    def main(self) -> np.ndarray:
        """Return each image's CIDEr, float64 [images]."""
        return self.statistics[MAIN][:, 0]


@dataclass(frozen=True)
class EvaluationResult:
    """An evaluation with its images."""

    evaluation: Evaluation
    predictions: Predictions

    @classmethod
    def read(cls, folder: str) -> Self:
        """Read what `write` wrote; `UserError` if there is none, or something else."""
        evaluation, uri = Evaluation.read(folder), storage.join(folder, "predictions.parquet")
        predictions = _read_predictions(uri)
        if len(predictions.image_ids) != evaluation.images:
            raise UserError(
                f"{uri}: has {len(predictions.image_ids)} images, and scores.json beside it "
                f"{evaluation.images}; "
                "evaluate again"
            )
        return cls(evaluation, predictions)

    def write(self, folder: str, report: str) -> None:
        """Write the folder's files, `report` the HTML page; until all are there, the folder has no
        `scores.json`."""
        storage.remove(
            storage.join(folder, "scores.json")
        )  # of an evaluation before, which is not of these images
        rows = zip(self.predictions.image_ids, self.predictions.captions, strict=True)
        results = [{"image_id": image_id, "caption": caption} for image_id, caption in rows]
        storage.write_json(storage.join(folder, "results.json"), results)
        storage.write_bytes(storage.join(folder, "predictions.parquet"), _parquet(self.predictions))
        storage.write_bytes(storage.join(folder, "report.html"), report.encode())
        storage.write_json(storage.join(folder, "scores.json"), self.evaluation.to_dict())


@dataclass(frozen=True)
class Decision:
    """Whether a challenger becomes the champion, and why."""

    promote: bool
    reason: str
    """In a sentence."""
    comparisons: list[Comparison] = field(default_factory=list)
    """With the champion, score by score; none where there was no champion."""


def _parquet(predictions: Predictions) -> bytes:
    shown = [predictions.views.get(image_id) for image_id in predictions.image_ids]
    columns: dict[str, Any] = {
        "image_id": pa.array(predictions.image_ids, pa.int64()),
        "file_name": pa.array(predictions.file_names, pa.string()),
        "caption": pa.array(predictions.captions, pa.string()),
        "references": pa.array(predictions.references, pa.list_(pa.string())),
    }
    for name, counts in predictions.statistics.items():
        if counts.shape[1] == 1:
            columns[name] = pa.array(counts[:, 0], pa.float64())
        else:
            columns[COUNTS + name] = pa.array(counts.tolist(), pa.list_(pa.float64()))
    columns["thumbnail"] = pa.array([view and view.thumbnail for view in shown], pa.binary())
    columns["words"] = pa.array(
        [view and [word for word, _ in view.words] for view in shown], pa.list_(pa.string())
    )
    columns["attention"] = pa.array(
        [view and [weights.tobytes() for _, weights in view.words] for view in shown],
        pa.list_(pa.binary()),
    )
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, compression="zstd")
    return file.getvalue()


def _read_predictions(uri: str) -> Predictions:
    what = "what captioner evaluate writes; evaluate again"
    table = read_parquet(uri, COLUMNS, what, others=True)
    with input_errors(uri, what):
        require_values(table, ["image_id", "file_name", "caption", "references"])
        values = {name: table[name].to_pylist() for name in table.column_names}
        statistics = {
            name.removeprefix(COUNTS): np.asarray(values[name], np.float64).reshape(
                table.num_rows, -1
            )
            for name in table.column_names
            if name not in COLUMNS
        }
        for name, counts in statistics.items():
            if not np.isfinite(counts).all() or (name == MAIN and counts.shape[1] != 1):
                raise ValueError(f"column {name} holds something else than scores")
        if MAIN not in statistics or not table.num_rows:
            raise ValueError(f"has no {MAIN}")
        shown = zip(
            values["image_id"],
            values["thumbnail"],
            values["words"],
            values["attention"],
            strict=True,
        )
        views = {
            row[0]: View(row[1], _words(row[2], row[3])) for row in shown if row[1] is not None
        }
        return Predictions(
            values["image_id"],
            values["file_name"],
            values["caption"],
            values["references"],
            statistics,
            views,
        )


def _words(words: list[str], maps: list[bytes]) -> list[tuple[str, np.ndarray]]:
    flat = [np.frombuffer(weights, np.uint8) for weights in maps]
    return [
        (word, one.reshape(round(len(one) ** 0.5), -1))
        for word, one in zip(words, flat, strict=True)
    ]
