"""Evaluating a model on a split of the data."""

import importlib.metadata
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import tee
from typing import TYPE_CHECKING, Generic, Self, TypeVar

import numpy as np

from model_lib import __version__
from model_lib.data.shards import Manifest, read_manifest
from model_lib.errors import WorkError
from model_lib.evaluate.config import EvaluateConfig
from model_lib.evaluate.gallery import select_images
from model_lib.evaluate.report import render_report
from model_lib.evaluate.result import (
    Evaluation,
    EvaluationResult,
    Predictions,
    View,
    require_comparable,
)
from model_lib.evaluate.scorecard import evaluation_metrics, evaluation_tags
from model_lib.evaluate.scoring import score_predictions
from model_lib.io import storage
from model_lib.io.images import decode_image
from model_lib.io.locks import output_lock
from model_lib.pages.page import thumbnail
from model_lib.progress import Progress
from model_lib.scores.diversity import describe
from model_lib.scores.metrics import require_scorers
from model_lib.tracking.errors import reason
from model_lib.tracking.metrics import read_curves
from model_lib.tracking.runs import NO_TRACKING, Tracking

if TYPE_CHECKING:
    from model_lib.data.shards import Batch, SplitReader
    from model_lib.model.captioning import Caption, ImageCaptioner
    from model_lib.scores.clipscore import ClipScorer

log = logging.getLogger(__name__)
UNSENT = "unsent.json"
"""File in the output folder for as long as MLflow does not have its scores."""
PACKAGES = ("torch", "transformers", "pillow", "pyarrow", "fsspec", "numpy", "tqdm")
"""The packages with which a model captions."""
Item = TypeVar("Item")


def evaluate(config: EvaluateConfig, tracking: Tracking = NO_TRACKING) -> Evaluation:
    """Evaluate a model, write the output folder, and log the scores to the model's run.

    Raises:
        UserError: the model or the data cannot be used.
        WorkError: the folder is whole, but its scores could not be logged; the same call does only
            that.
    """
    require_scorers(config.spice)
    with output_lock(config.output):
        unsent, mark = storage.join(config.output, UNSENT), {"key": _key(config)}
        if storage.exists(unsent) and storage.read_json(unsent) == mark:
            log.warning("%s: was evaluated before, only its scores are sent", config.output)
            evaluation = Evaluation.read(config.output)
        else:
            others = [EvaluationResult.read(folder) for folder in config.compare]
            result = _evaluate(config, others)
            require_comparable([result, *others])
            evaluation = result.evaluation
            storage.remove(unsent)
            run_id = evaluation.mlflow_run_id
            curves = {} if run_id is None else {run_id: read_curves(config.model)}
            result.write(config.output, render_report(result, others=others, curves=curves))
            storage.write_json(unsent, mark)
        _log_scores(config, evaluation, tracking, mark["key"])
        storage.remove(unsent)
        return evaluation


def _key(config: EvaluateConfig) -> str:
    """Return a key of the options, the data, the model and this program."""
    record = storage.join(config.model, "training.json")  # changes with each model that is kept
    about = storage.read_bytes(record).decode() if storage.exists(record) else ""
    return config.key(read_manifest(config.data).fingerprint, about, __version__)


def _log_scores(
    config: EvaluateConfig, evaluation: Evaluation, tracking: Tracking, key: str
) -> None:
    """Log an evaluation that is written to the run of the model's training.

    Another project's model has none, nor has an average: their evaluation gets a run of its own,
    found again by `key`. A registered model was evaluated before.
    """
    if evaluation.model.startswith("models:/"):
        return
    folder = config.output
    page = storage.read_bytes(storage.join(folder, "report.html")).decode()
    manifest = read_manifest(config.data)
    data = manifest.as_input(config.data, config.split, "evaluation")
    metrics, tags = evaluation_metrics(evaluation), evaluation_tags(evaluation)
    try:
        run_id = evaluation.mlflow_run_id
        if run_id is None:
            run_id = tracking.finished_run(evaluation.name, key)
        if run_id is not None:
            pages = {"evaluation/report.html": page}
            tracking.add(run_id, metrics, tags, pages, data, evaluation.model)
    except Exception as error:
        raise WorkError(
            f"{folder}: is written, but its scores are not in MLflow ({reason(error)}); the same "
            "command sends them, and evaluates nothing again"
        ) from error


def _evaluate(config: EvaluateConfig, others: Sequence[EvaluationResult]) -> EvaluationResult:
    from model_lib.data.leaks import require_unseen
    from model_lib.data.shards import SplitReader
    from model_lib.model.rivals import Rival, load_captioner
    from model_lib.model.sources import lasting_source, source_digest

    manifest = read_manifest(config.data)
    source = lasting_source(config.model)
    _require_comparable(config, manifest, source, others)
    weights = source_digest(source)  # before loading: never of weights that came meanwhile
    model = load_captioner(source, config.device, config.precision, config.prompt)
    record = model.training_record
    require_unseen(record, manifest, config.split)
    reader = SplitReader(manifest, config.split, model.preprocess, limit=config.limit)
    scorer = None
    if config.clip is not None:
        from model_lib.scores.clipscore import ClipScorer

        scorer = ClipScorer(config.clip, config.device)

    rows: list[tuple[int, str, Caption, list[str]]] = []
    vectors: list[np.ndarray] = []
    read = _Timed(reader.batches(reader.in_order(config.batch_size)))
    batches, ahead = tee(read)
    captioned = _Timed(model.caption_batches((batch.pixels for batch in ahead), config.decode))
    with Progress(f"evaluate on {config.split}", reader.rows, "images") as progress:
        for captions_of_batch, batch in zip(captioned, batches, strict=True):
            captions = [best for (best,) in captions_of_batch]
            rows += zip(batch.image_ids, batch.file_names, captions, batch.captions, strict=True)
            if scorer is not None:
                vectors.append(_encode_images(scorer, model, batch))
            progress.advance(len(captions))

    order = sorted(range(len(rows)), key=lambda number: rows[number][0])
    ids, names, captions, references = map(list, zip(*(rows[n] for n in order), strict=True))
    texts = [caption.text for caption in captions]
    clip_scores: dict[str, np.ndarray] = {}
    if scorer is not None:
        clip_scores = scorer.score(texts, references, np.concatenate(vectors)[order])
    training = None
    if config.split != "train" and manifest.counts.get("train"):
        lists = SplitReader(manifest, "train").captions()
        training = [text for captions_of_image in lists for text in captions_of_image]
    ended = [model.has_ended(caption) for caption in captions]
    result = score_predictions(
        Predictions(ids, names, texts, references),
        clip_scores,
        config.spice,
        name=record.get("name", "model"),
        model=source,
        split=config.split,
        diversity=describe(texts, ended, training),
        decoding=config.decode.to_dict(),
        rival=model.usage if isinstance(model, Rival) else {},
        images_per_second=len(rows) / (captioned.seconds - read.seconds),
        clip=config.clip,
        data_fingerprint=manifest.fingerprint,
        # A registered model was evaluated in its own run before it was registered; this result is
        # another pipeline's.
        mlflow_run_id=None if source.startswith("models:/") else record.get("mlflow_run_id"),
        # Not torch's +cpu.
        packages={name: importlib.metadata.version(name).split("+")[0] for name in PACKAGES},
        weights=weights,
    )
    selected = select_images(result.predictions.cider())
    views = _views(model, reader, [order[n] for n in selected], [captions[n] for n in selected])
    return replace(result, predictions=replace(result.predictions, views=views))


class _Timed(Generic[Item]):
    """Iterates over items, and counts the seconds that making them takes."""

    def __init__(self, items: Iterable[Item]) -> None:
        self.items, self.seconds = iter(items), 0.0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Item:
        began = time.perf_counter()
        try:
            return next(self.items)
        finally:
            self.seconds += time.perf_counter() - began


def _require_comparable(
    config: EvaluateConfig, manifest: Manifest, source: str, others: Sequence[EvaluationResult]
) -> None:
    """Raise `UserError` if it is known before the work that evaluations cannot be compared."""
    for other in others:
        expected = replace(
            other.evaluation,
            model=source,
            data_fingerprint=manifest.fingerprint,
            split=config.split,
            decoding=config.decode.to_dict(),
            clip=config.clip,
        )
        require_comparable([replace(other, evaluation=expected), other])


def _encode_images(scorer: "ClipScorer", model: "ImageCaptioner", batch: "Batch") -> np.ndarray:
    """Return CLIP's vectors of a batch; the model's pixels serve if CLIP takes the same."""
    pixels = batch.pixels
    if scorer.preprocess != model.preprocess:
        pixels = [scorer.preprocess(decode_image(content)) for content in batch.files]
    return scorer.encode_images(np.stack(pixels))


def _views(
    model: "ImageCaptioner",
    reader: "SplitReader",
    numbers: Sequence[int],
    captions: Sequence["Caption"],
) -> Mapping[int, View]:
    """Return the report's views of some images, given by their numbers in the split, by id.

    They show the attention of our models.
    """
    from model_lib.evaluate.explain import word_attention
    from model_lib.model.captioner import Captioner

    views: dict[int, View] = {}
    batches = reader.batches([np.array([number]) for number in numbers])
    for batch, caption in zip(batches, captions, strict=True):
        words, image = [], decode_image(batch.files[0])
        seen = (100.0, 100.0)
        if isinstance(model, Captioner):
            words = [
                (word, (255 * weights / max(float(weights.max()), 1e-9)).round().astype(np.uint8))
                for word, weights in word_attention(model, batch.pixels[0], caption)
            ]
            seen = model.preprocess.seen_part(*image.size)
        views[batch.image_ids[0]] = View(thumbnail(image), words, seen)
    return views
