"""Evaluating captions: a model on a split of the data, or anyone's COCO results file."""

import importlib.metadata
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING

import numpy as np

from model_lib import __version__
from model_lib.data.coco import SURROGATES, read_captions
from model_lib.errors import UserError, WorkError
from model_lib.evaluate.config import EvaluateConfig
from model_lib.evaluate.gallery import to_show
from model_lib.evaluate.result import FEW_IMAGES, Evaluation, EvaluationResult, Predictions, View
from model_lib.evaluate.scorecard import evaluation_metrics, evaluation_tags
from model_lib.ingest.image_source import open_image_source
from model_lib.io import storage
from model_lib.io.images import ImageError, decode_image
from model_lib.io.locks import output_lock
from model_lib.model.config import DecodeConfig
from model_lib.pages.page import thumbnail
from model_lib.progress import Progress
from model_lib.scores.diversity import describe
from model_lib.scores.metrics import require_scorers, score_captions
from model_lib.scores.significance import corpus_scores, intervals
from model_lib.scores.spice import require_spice
from model_lib.tracking.mlflow_run import reason
from model_lib.tracking.server import NO_TRACKING, Tracking

if TYPE_CHECKING:
    from model_lib.data.shards import SplitReader
    from model_lib.model.captioner import Captioner
    from model_lib.model.captioning import Caption

log = logging.getLogger(__name__)
UNSENT = "unsent.json"
"""File in the output folder for as long as MLflow does not have its scores."""
PACKAGES = ("torch", "transformers", "pillow", "pyarrow", "fsspec", "numpy", "tqdm")
"""What a model needs to caption."""


def evaluate(config: EvaluateConfig, tracking: Tracking = NO_TRACKING) -> Evaluation:
    """Evaluate a model or a results file; write the folder if an output is named, and log a model's
    scores to its run.

    Raises:
        UserError: the model, data, results or annotations cannot be used.
        WorkError: the folder is whole, but its scores could not be logged; the same call does only
            that.
    """
    require_scorers()
    if config.spice is not None:
        require_spice(config.spice)
    if config.output is None:
        return _evaluate(config).evaluation
    with output_lock(config.output):
        if config.model is not None and _left_unsent(config):
            log.warning(
                "%s: was evaluated before, and only its scores are to be sent", config.output
            )
            return _send(config, Evaluation.read(config.output), tracking)
        return _write(config, _evaluate(config), tracking)


def _evaluate(config: EvaluateConfig) -> EvaluationResult:
    result = _evaluate_model(config) if config.model is not None else _evaluate_results(config)
    evaluation = result.evaluation
    for name, why in evaluation.missing.items():
        log.warning("%s is missing: %s", name, why)
    if evaluation.tokenizer != "PTB":
        log.warning(
            "without Java the captions are split plainly: do not compare these scores with "
            "published ones"
        )
    if evaluation.images < FEW_IMAGES:
        log.warning("only %d images: CIDEr means little on so few", evaluation.images)
    return result


def _write(config: EvaluateConfig, result: EvaluationResult, tracking: Tracking) -> Evaluation:
    """Write the output folder, and log a model's scores to its run."""
    from model_lib.evaluate.report import render_report

    assert config.output is not None
    evaluation, run_id = result.evaluation, result.evaluation.mlflow_run_id
    curves = {run_id: tracking.curves(run_id)} if run_id is not None else None
    storage.remove(
        storage.join(config.output, UNSENT)
    )  # of an evaluation before, which this one replaces
    result.write(config.output, render_report(result, curves=curves))
    if run_id is not None:
        storage.write_json(storage.join(config.output, UNSENT), {"key": _key(config)})
        _send(config, evaluation, tracking)
    return evaluation


def _key(config: EvaluateConfig) -> str:
    """Return what changes with the options, the data, the model and this program."""
    assert config.model is not None and config.data is not None
    from model_lib.data.shards import read_manifest

    record = storage.join(
        config.model, "training.json"
    )  # changes with each model that training keeps
    about = storage.read_bytes(record).decode() if storage.exists(record) else ""
    return config.key(read_manifest(config.data).fingerprint, about, __version__)


def _left_unsent(config: EvaluateConfig) -> bool:
    """Whether the output holds this very evaluation, and MLflow was away when it was to be
    logged."""
    assert config.output is not None
    file, scores = (storage.join(config.output, name) for name in (UNSENT, "scores.json"))
    return (
        storage.exists(file)
        and storage.exists(scores)
        and storage.read_json(file) == {"key": _key(config)}
    )


def _send(config: EvaluateConfig, evaluation: Evaluation, tracking: Tracking) -> Evaluation:
    """Log an evaluation that is written to the model's run; its folder remembers if that fails."""
    assert config.output is not None and evaluation.mlflow_run_id is not None
    run_id, report = (
        evaluation.mlflow_run_id,
        storage.read_bytes(storage.join(config.output, "report.html")),
    )
    try:
        tracking.add(
            run_id,
            evaluation_metrics(evaluation),
            evaluation_tags(evaluation),
            {"evaluation/report.html": report},
        )
    except Exception as error:
        raise WorkError(
            f"{config.output}: is written, but its scores are not in MLflow ({reason(error)}); "
            "the same command sends "
            "them, and evaluates nothing again"
        ) from error
    storage.remove(storage.join(config.output, UNSENT))
    return evaluation


def _evaluate_results(config: EvaluateConfig) -> EvaluationResult:
    assert config.results is not None and config.annotations is not None
    results, annotations = config.results, config.annotations
    images, references = read_captions(annotations)
    captions = read_results(results)
    strangers = captions.keys() - {i for i, texts in references.items() if texts}
    if strangers:
        raise UserError(
            f"{results}: image_id {min(strangers)} has no reference captions in {annotations}"
        )
    if len(captions) < len(images):
        log.warning(
            "%s captions %d of the %d images in %s",
            results,
            len(captions),
            len(images),
            annotations,
        )
    ids, names = sorted(captions), dict(images)
    said = Predictions(
        ids, [names[i] for i in ids], [captions[i] for i in ids], [references[i] for i in ids], {}
    )
    files = _files(config.images, said.file_names) if config.images is not None else None
    evaluation, predictions = _score(config, results, results, annotations, said, files, [], None)
    return EvaluationResult(evaluation, predictions)


def _files(folder: str, names: Sequence[str]) -> Iterator[list[bytes]]:
    """Yield batches of image files; `UserError` if one is missing."""
    place = open_image_source(folder)
    for start in range(0, len(names), 32):
        yield [place.read(name) for name in names[start : start + 32]]


def read_results(uri: str) -> dict[int, str]:
    """Read a COCO results JSON: caption by image id; `UserError` if it is something else or names
    an id twice."""
    document = storage.read_json(uri)
    captions: dict[int, str] = {}
    try:
        for row in document:
            image_id, caption = row["image_id"], row["caption"]
            if type(image_id) is not int or abs(image_id) >= 2**63 or not isinstance(caption, str):
                raise TypeError(f"image_id {image_id!r:.60} with caption {caption!r:.60}")
            if image_id in captions:
                raise UserError(f"{uri}: image_id {image_id} occurs twice")
            captions[image_id] = SURROGATES.sub("", caption)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{uri}: is not COCO results ({type(error).__name__}: {error}); expected "
            f'[{{"image_id", "caption"}}]'
        ) from error
    if not captions:
        raise UserError(f"{uri}: holds no captions")
    return captions


def _evaluate_model(config: EvaluateConfig) -> EvaluationResult:
    from model_lib.data.leaks import require_unseen
    from model_lib.data.shards import SplitReader, read_manifest
    from model_lib.model.captioner import Captioner
    from model_lib.model.captioning import caption_pixels
    from model_lib.model.sources import lasting_source, source_digest

    assert config.model is not None and config.data is not None
    manifest = read_manifest(config.data)
    source = lasting_source(config.model)
    weights = source_digest(
        source
    )  # before they are loaded: it is then never that of others which came meanwhile
    model = Captioner.from_pretrained(source, device=config.device, precision=config.precision)
    require_unseen(model.training_record, manifest, config.split)
    reader = SplitReader(manifest, config.split, size=model.image_size, limit=config.limit)
    decoding = DecodeConfig(**{f.name: getattr(config, f.name) for f in fields(DecodeConfig)})
    plan, seconds = reader.in_order(config.batch_size), 0.0
    found: list[tuple[int, str, Caption, list[str]]] = []
    with Progress(f"evaluate on {config.split}", reader.rows, "images") as progress:
        for batch in reader.batches(plan):
            began = time.perf_counter()
            captions = [one for (one,) in caption_pixels(model, batch.pixels, decoding)]
            seconds += time.perf_counter() - began
            found += zip(batch.image_ids, batch.file_names, captions, batch.captions, strict=True)
            progress.advance(len(batch.image_ids))
    order = sorted(range(len(found)), key=lambda place: found[place][0])
    ids, names, captions, references = (
        list(column) for column in zip(*(found[n] for n in order), strict=True)
    )
    said = Predictions(ids, names, [caption.text for caption in captions], references, {})
    end = model.tokenizer.eos_token_id
    learned = None
    if config.split != "train" and manifest.counts.get("train"):
        training = SplitReader(manifest, "train", size=model.image_size).captions()
        learned = [text for texts in training for text in texts]
    files = (
        list(batch.files) for batch in reader.batches([np.array(order)[part] for part in plan])
    )
    name = model.training_record.get("name", "model")
    ended = [bool(caption.tokens) and caption.tokens[-1] == end for caption in captions]
    evaluation, predictions = _score(
        config, name, source, config.split, said, files, ended, learned
    )
    evaluation = replace(
        evaluation,
        decoding=decoding.to_dict(),
        images_per_second=len(found) / seconds,
        data_fingerprint=manifest.fingerprint,
        # A registered model was evaluated in its own run before it was registered; this result is
        # another pipeline's.
        mlflow_run_id=None
        if source.startswith("models:/")
        else model.training_record.get("mlflow_run_id"),
        packages={
            name: importlib.metadata.version(name).split("+")[0] for name in PACKAGES
        },  # not torch's +cpu
        weights=weights,
    )
    places = to_show(predictions.main())
    views = _views(model, reader, [order[n] for n in places], [captions[n] for n in places])
    return EvaluationResult(evaluation, replace(predictions, views=views))


def _score(
    config: EvaluateConfig,
    name: str,
    model: str,
    split: str,
    said: Predictions,
    files: Iterator[list[bytes]] | None,
    ended: Sequence[bool],
    learned: Sequence[str] | None,
) -> tuple[Evaluation, Predictions]:
    references = dict(zip(said.image_ids, said.references, strict=True))
    scores = score_captions(
        dict(zip(said.image_ids, said.captions, strict=True)), references, config.spice
    )
    statistics = dict(scores.statistics)
    if config.clip is not None and files is not None:
        from model_lib.scores.clipscore import ClipScorer

        try:
            fit = ClipScorer(config.clip, config.device).score(
                said.captions, said.references, files
            )
        except ImageError as error:
            raise UserError(
                f"{config.images or config.data}: an image cannot be shown to CLIP: {error}"
            ) from error
        statistics |= {score: values[:, None] for score, values in fit.items()}
    evaluation = Evaluation(
        name=name,
        model=model,
        split=split,
        images=len(said.image_ids),
        scores=corpus_scores(statistics),
        intervals=intervals(statistics),
        shuffled_cider=scores.shuffled_cider,
        frequencies=f"the reference captions of these {len(said.image_ids):,} images",
        diversity=describe(said.captions, ended, learned),
        tokenizer=scores.tokenizer,
        missing=scores.missing,
        decoding={},
        clip=config.clip,
    )
    return evaluation, replace(said, statistics=statistics)


def _views(
    model: "Captioner", reader: "SplitReader", numbers: Sequence[int], captions: Sequence["Caption"]
) -> Mapping[int, View]:
    """Return the report's views of images, by their numbers in the split, and where the model
    looked."""
    from model_lib.model.explain import word_attention

    views: dict[int, View] = {}
    said = iter(captions)
    for batch in reader.batches([np.array([number]) for number in numbers]):
        looked = word_attention(model, batch.pixels[0], next(said))
        words = [
            (word, (255 * weights / max(float(weights.max()), 1e-9)).round().astype(np.uint8))
            for word, weights in looked
        ]
        views[batch.image_ids[0]] = View(thumbnail(decode_image(batch.files[0])), words)
    return views
