"""The result of an evaluation, and its folder: the scores, and the caption of each image.

The folder holds `results.json` (COCO's results format), `predictions.parquet`, `report.html` and,
written last, `scores.json`. From it candidates and champion are compared, without the models and
without the scorers.
"""

import dataclasses
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from model_lib.io import storage
from model_lib.io.errors import input_errors
from model_lib.io.validation import read_parquet, read_record, require_values
from model_lib.options import require
from model_lib.scores.significance import Comparison, Statistics

FEW_IMAGES = 100
"""On fewer images CIDEr means little: how rare a word is, is counted in their references."""
MAIN = "CIDEr"
COLUMNS = {
    "image_id": "int",
    "file_name": "text",
    "caption": "text",
    "references": "list of text",
    "thumbnail": "bytes",
    "words": "list of text",
    "attention": "list of bytes",
    "seen_width": "float",
    "seen_height": "float",
}
"""Of predictions.parquet, besides a column for each score."""
SEEN = ("seen_width", "seen_height")
COMPARABLE = ("data_fingerprint", "split", "images", "tokenizer", "decoding", "clip")
"""Fields of two evaluations that must be equal before their scores may be compared."""
COUNTS = "counts of "
"""Before the names of columns that hold a score's counts."""


@dataclass(frozen=True)
class Evaluation:
    """The content of `scores.json`: scores, and everything that must agree before two evaluations
    may be compared."""

    name: str
    model: str
    """Source of the model, or the results file."""
    split: str
    """Split of the data, or the annotations."""
    images: int
    scores: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    """Each score's 95 % interval, by bootstrap over the images."""
    shuffled_cider: float
    """CIDEr of a model that ignores the image: see `metrics.Scores`."""
    frequencies: str
    """The captions in which CIDEr counts how rare an n-gram is."""
    diversity: dict[str, float]
    """See `diversity.describe`."""
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
    """Digest of the weights in a folder, which may change later: see `sources.weights_digest`."""
    rival: dict[str, Any] = field(default_factory=dict)
    """Of another project's captioner, how it captions: see `Rival.usage`. Empty for ours."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def figures(self) -> dict[str, float]:
        """Return all numbers, by their names in a tracking server."""
        values = {**self.scores, f"{MAIN}_shuffled": self.shuffled_cider}
        values |= {f"diversity_{name}": value for name, value in self.diversity.items()}
        if self.images_per_second is not None:
            values["images_per_second"] = self.images_per_second
        return values

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
    """The caption's words with their attention, uint8 [P, P], over what the model sees."""
    seen: tuple[float, float] = (100.0, 100.0)
    """The part of the width and of the height about the centre that the model sees, in percent."""


@dataclass(frozen=True)
class Predictions:
    """The captions, in the order of the images' ids."""

    image_ids: list[int]
    file_names: list[str]
    captions: list[str]
    references: list[list[str]]
    statistics: Statistics = field(default_factory=dict)
    """For each score its counts, float64 [images, counts]."""
    views: Mapping[int, View] = field(default_factory=dict)
    """Of some images, by id."""

    def cider(self) -> np.ndarray:
        """Return each image's CIDEr, float64 [images]."""
        return self.statistics[MAIN][:, 0]


@dataclass(frozen=True)
class EvaluationResult:
    """An evaluation with its captions."""

    evaluation: Evaluation
    predictions: Predictions

    @classmethod
    def read(cls, folder: str) -> Self:
        """Read what `write` wrote; `UserError` if there is none, or something else."""
        evaluation, uri = Evaluation.read(folder), storage.join(folder, "predictions.parquet")
        predictions = read_predictions(uri)
        counts = f"{len(predictions.image_ids)} images, and scores.json beside it"
        message = f"{uri}: has {counts} {evaluation.images}; evaluate again"
        require(len(predictions.image_ids) == evaluation.images, message)
        return cls(evaluation, predictions)

    def write(self, folder: str, report: str) -> None:
        """Write the folder's files, with `report` as the HTML page.

        The folder has no `scores.json`, also none of an evaluation before, until all are there.
        """
        storage.remove(storage.join(folder, "scores.json"))
        rows = zip(self.predictions.image_ids, self.predictions.captions, strict=True)
        results = [{"image_id": image_id, "caption": caption} for image_id, caption in rows]
        storage.write_json(storage.join(folder, "results.json"), results)
        parquet = encode_predictions(self.predictions)
        storage.write_bytes(storage.join(folder, "predictions.parquet"), parquet)
        storage.write_bytes(storage.join(folder, "report.html"), report.encode())
        storage.write_json(storage.join(folder, "scores.json"), self.evaluation.to_dict())


def require_comparable(results: Sequence[EvaluationResult]) -> None:
    """Raise `UserError` unless all were evaluated on the same images in the same way."""
    first = results[0]
    for other in results[1:]:
        both = f"evaluations of {first.evaluation.model} and {other.evaluation.model}"
        remedy = "evaluate both on the same data with the same options"
        for name in COMPARABLE:
            ours, theirs = getattr(first.evaluation, name), getattr(other.evaluation, name)
            require(ours == theirs, f"{both} differ in {name} ({ours} and {theirs}); {remedy}")
        same = first.predictions.image_ids == other.predictions.image_ids
        require(same, f"{both} are of different images; {remedy}")


@dataclass(frozen=True)
class Decision:
    """Whether a challenger becomes the champion, and why."""

    promote: bool
    reason: str
    """One sentence."""
    comparisons: list[Comparison] = field(default_factory=list)
    """With the champion, score by score; empty if there was no champion."""


def encode_predictions(predictions: Predictions) -> bytes:
    """Return the content of `predictions.parquet`."""
    views = [predictions.views.get(image_id) for image_id in predictions.image_ids]
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
    words = [view and [word for word, _ in view.words] for view in views]
    attention = [view and [weights.tobytes() for _, weights in view.words] for view in views]
    columns["thumbnail"] = pa.array([view and view.thumbnail for view in views], pa.binary())
    columns["words"] = pa.array(words, pa.list_(pa.string()))
    columns["attention"] = pa.array(attention, pa.list_(pa.binary()))
    for n, name in enumerate(SEEN):
        columns[name] = pa.array([view and view.seen[n] for view in views], pa.float64())
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, compression="zstd")
    return file.getvalue()


def read_predictions(uri: str) -> Predictions:
    """Read a `predictions.parquet`; `UserError` if it is missing, or something else."""
    what = "what captioner evaluate writes; evaluate again"
    table = read_parquet(uri, COLUMNS, what, others=True)
    texts = ["image_id", "file_name", "caption", "references"]
    with input_errors(uri, what):
        require_values(table, texts)
        values = {name: table[name].to_pylist() for name in table.column_names}
        statistics = {
            name.removeprefix(COUNTS): np.array(column, np.float64).reshape(table.num_rows, -1)
            for name, column in values.items()
            if name not in COLUMNS
        }
        for name, counts in statistics.items():
            if not np.isfinite(counts).all() or (name == MAIN and counts.shape[1] != 1):
                raise ValueError(f"column {name} holds something else than scores")
        if MAIN not in statistics or not table.num_rows:
            raise ValueError(f"has no {MAIN}")
        views = {}
        names_of_view = ("image_id", "thumbnail", "words", "attention", *SEEN)
        columns = (values[name] for name in names_of_view)
        for image_id, jpeg, words, maps, *seen in zip(*columns, strict=True):
            if jpeg is not None:
                attention = list(zip(words, map(_square, maps), strict=True))
                views[image_id] = View(jpeg, attention, (float(seen[0]), float(seen[1])))
        ids, names, captions, references = (values[name] for name in texts)
        return Predictions(ids, names, captions, references, statistics, views)


def _square(weights: bytes) -> np.ndarray:
    return np.frombuffer(weights, np.uint8).reshape(round(len(weights) ** 0.5), -1)
