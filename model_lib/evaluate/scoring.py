"""Scoring captions against references: a model's, and those of any COCO results file."""

import logging
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from model_lib.data.coco import SURROGATES, image_id_of, read_captions
from model_lib.errors import UserError
from model_lib.evaluate.config import ScoreConfig
from model_lib.evaluate.report import render_report
from model_lib.evaluate.result import FEW_IMAGES, Evaluation, EvaluationResult, Predictions
from model_lib.ingest.image_source import open_image_source
from model_lib.io import storage
from model_lib.io.errors import input_errors
from model_lib.io.images import ImageError, decode_image
from model_lib.io.locks import output_lock
from model_lib.io.prefetch import prefetch_map
from model_lib.scores.diversity import describe
from model_lib.scores.metrics import require_scorers, score_captions
from model_lib.scores.significance import corpus_scores, intervals

if TYPE_CHECKING:
    from model_lib.scores.clipscore import ClipScorer

log = logging.getLogger(__name__)
BATCH_SIZE = 32
"""Images that CLIP encodes together."""


def score(config: ScoreConfig) -> Evaluation:
    """Score a results file, and write the folder if an output is named.

    Raises:
        UserError: the results, annotations or images cannot be used.
    """
    require_scorers(config.spice)
    if config.output is None:
        return _score_results(config).evaluation
    with output_lock(config.output):
        result = _score_results(config)
        result.write(config.output, render_report(result))
    return result.evaluation


def _score_results(config: ScoreConfig) -> EvaluationResult:
    images, references = read_captions(config.annotations)
    captions = read_results(config.results)
    unknown = captions.keys() - {i for i, texts in references.items() if texts}
    if unknown:
        message = f"image_id {min(unknown)} has no reference captions in {config.annotations}"
        raise UserError(f"{config.results}: {message}")
    if len(captions) < len(images):
        counts = f"{len(captions)} of the {len(images)} images"
        log.warning("%s captions %s in %s", config.results, counts, config.annotations)
    ids, names = sorted(captions), dict(images)
    predictions = Predictions(
        image_ids=ids,
        file_names=[names.get(i, "") for i in ids],
        captions=[captions[i] for i in ids],
        references=[references[i] for i in ids],
    )
    clip_scores: dict[str, np.ndarray] = {}
    if config.clip is not None and config.images is not None:
        from model_lib.scores.clipscore import ClipScorer

        scorer = ClipScorer(config.clip, config.device)
        vectors = _encode_images(scorer, config.images, predictions.file_names)
        clip_scores = scorer.score(predictions.captions, predictions.references, vectors)
    return score_predictions(
        predictions,
        clip_scores,
        config.spice,
        name=config.results,
        model=config.results,
        split=config.annotations,
        diversity=describe(predictions.captions, [], None),
        decoding={},
        clip=config.clip,
    )


def _encode_images(scorer: "ClipScorer", folder: str, names: list[str]) -> np.ndarray:
    """Return CLIP's vectors, float32 [images, D]; `UserError` if an image cannot be used."""
    source = open_image_source(folder)

    def load(name: str) -> np.ndarray:
        try:
            return scorer.preprocess(decode_image(source.read(name)))
        except ImageError as error:
            raise UserError(f"{source.uri(name)}: {error}") from error

    vectors = []
    with closing(prefetch_map(load, names, depth=2 * BATCH_SIZE)) as images:
        while batch := list(islice(images, BATCH_SIZE)):
            vectors.append(scorer.encode_images(np.stack(batch)))
    return np.concatenate(vectors)


def read_results(uri: str) -> dict[int, str]:
    """Read a COCO results JSON: caption by image id; `UserError` if it is something else or names
    an id twice."""
    captions: dict[int, str] = {}
    rows = storage.read_json(uri)
    with input_errors(uri, 'COCO results; expected [{"image_id", "caption"}]'):
        for row in rows:
            image_id, caption = image_id_of(row["image_id"]), row["caption"]
            if not isinstance(caption, str):
                raise TypeError(f"image_id {image_id} has caption {caption!r:.60}")
            if image_id in captions:
                raise UserError(f"{uri}: image_id {image_id} occurs twice")
            captions[image_id] = SURROGATES.sub("", caption)
    if not captions:
        raise UserError(f"{uri}: holds no captions")
    return captions


def score_predictions(
    predictions: Predictions,
    clip_scores: Mapping[str, np.ndarray],
    spice: str | None,
    **fields: Any,
) -> EvaluationResult:
    """Return the scores of captions, with warnings of what limits their use.

    Args:
        predictions: the captions, in the order of their images' ids.
        clip_scores: scores by CLIP, float64 [images] each.
        spice: a folder with SPICE's models; None: no SPICE.
        fields: the fields of `Evaluation` that do not follow from the captions.
    """
    ids = predictions.image_ids
    captions = dict(zip(ids, predictions.captions, strict=True))
    references = dict(zip(ids, predictions.references, strict=True))
    scores = score_captions(captions, references, spice)
    statistics = dict(scores.statistics)
    statistics |= {name: values[:, None] for name, values in clip_scores.items()}
    evaluation = Evaluation(
        images=len(ids),
        scores=corpus_scores(statistics),
        intervals=intervals(statistics),
        shuffled_cider=scores.shuffled_cider,
        frequencies=f"the reference captions of these {len(ids):,} images",
        tokenizer=scores.tokenizer,
        missing=scores.missing,
        **fields,
    )
    for name, reason in scores.missing.items():
        log.warning("%s is missing: %s", name, reason)
    if scores.tokenizer != "PTB":
        log.warning(
            "without Java's tokeniser the captions are split plainly: do not compare these scores "
            "with published ones"
        )
    if len(ids) < FEW_IMAGES:
        log.warning("only %d images: CIDEr means little on so few", len(ids))
    return EvaluationResult(evaluation, replace(predictions, statistics=statistics))
