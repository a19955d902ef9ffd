"""Judging captions: a model on a split of the data, or anyone's COCO results file.

A model's evaluation is a folder: `results.json` (COCO's results format), `report.html`, and `scores.json`, written
last, from which candidates and champion are compared.
"""

import dataclasses
import importlib.metadata
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from model_lib import storage
from model_lib.annotations import read_captions
from model_lib.config import DecodeConfig, EvaluateConfig
from model_lib.errors import UserError
from model_lib.metrics import Scores, require_scorers, score_captions
from model_lib.progress import Progress
from model_lib.tracking import NO_TRACKING, Tracking

log = logging.getLogger(__name__)
FEW_PICTURES = 100
PACKAGES = ("torch", "transformers", "pillow", "pyarrow", "fsspec", "numpy", "tqdm")
"""What a model needs to caption."""


@dataclass(frozen=True)
class Evaluation:
    """What `scores.json` says: scores, and everything that must agree before two of them may be compared."""

    name: str
    model: str
    """Where the model lies, or the results file."""
    split: str
    pictures: int
    scores: dict[str, float]
    shuffled_cider: float
    tokenizer: str
    missing: dict[str, str]
    decoding: dict[str, Any]
    data_fingerprint: str | None = None
    mlflow_run_id: str | None = None
    examples: list[dict[str, str]] = dataclasses.field(default_factory=list)
    """A few pictures' file names and captions."""
    packages: dict[str, str] = dataclasses.field(default_factory=dict)
    """Versions of the packages with which the model captioned."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def read(cls, folder: str) -> Self:
        """Read the evaluation in `folder`; `UserError` if there is none."""
        uri = storage.join(folder, "scores.json")
        try:
            return cls(**storage.read_json(uri))
        except TypeError as error:
            raise UserError(f"{uri}: is not what captioner evaluate writes ({error})") from error


Judged = tuple[Evaluation, dict[int, str], dict[int, list[str]], Scores, list[dict[str, Any]]]
"""The evaluation; captions and references by image id; all scores; the pictures for the report."""


def evaluate(config: EvaluateConfig, tracking: Tracking = NO_TRACKING) -> Evaluation:
    """Judge a model or a results file; write the folder if an output is named.

    Raises:
        UserError: the model, data, results or annotations cannot be used.
    """
    require_scorers()
    if config.output is not None:
        storage.require_writable(config.output)
    if config.results is not None and config.annotations is not None:
        evaluation, captions, references, scores, gallery = _judge_results(config.results, config.annotations)
    else:
        evaluation, captions, references, scores, gallery = _judge_model(config)
    for name, reason in scores.missing.items():
        log.warning("%s is missing: %s", name, reason)
    if scores.tokenizer != "PTB":
        log.warning("without Java the captions are split plainly: do not compare these scores with published ones")
    if evaluation.pictures < FEW_PICTURES:
        log.warning("only %d pictures: CIDEr means little on so few", evaluation.pictures)
    if config.output is not None:
        _write(config.output, evaluation, captions, references, scores, gallery, tracking)
    return evaluation


def _judge_results(results: str, annotations: str) -> Judged:
    images, references = read_captions(annotations)
    captions = read_results(results)
    strangers = captions.keys() - {i for i, texts in references.items() if texts}
    if strangers:
        raise UserError(f"{results}: image_id {min(strangers)} has no reference captions in {annotations}")
    if len(captions) < len(images):
        log.warning("%s captions %d of the %d pictures in %s", results, len(captions), len(images), annotations)
    scores = score_captions(captions, references)
    return _evaluation(results, results, annotations, captions, scores, {}), captions, references, scores, []


def read_results(uri: str) -> dict[int, str]:
    """Read a COCO results JSON: caption by image id; `UserError` if it is something else or names an id twice."""
    document = storage.read_json(uri)
    captions: dict[int, str] = {}
    try:
        for row in document:
            image_id, caption = row["image_id"], row["caption"]
            if not isinstance(image_id, int) or not isinstance(caption, str):
                raise TypeError(f"image_id {image_id!r} with caption {caption!r}")
            if image_id in captions:
                raise UserError(f"{uri}: image_id {image_id} occurs twice")
            captions[image_id] = caption
    except (KeyError, TypeError) as error:
        raise UserError(
            f'{uri}: is not COCO results ({type(error).__name__}: {error}); expected [{{"image_id", "caption"}}]'
        ) from error
    if not captions:
        raise UserError(f"{uri}: holds no captions")
    return captions


def _judge_model(config: EvaluateConfig) -> Judged:
    from model_lib.captioning import caption_pixels
    from model_lib.leaks import require_unseen
    from model_lib.model import Captioner
    from model_lib.shards import SplitReader, read_manifest
    from model_lib.sources import lasting_source

    assert config.model is not None and config.data is not None
    manifest = read_manifest(config.data)
    source = lasting_source(config.model)
    model = Captioner.from_pretrained(source, device=config.device, precision=config.precision)
    require_unseen(model.training_record, manifest, config.split)
    reader = SplitReader(manifest, config.split, size=model.image_size, limit=config.limit)
    decoding = DecodeConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(DecodeConfig)})
    captions, references, gallery = {}, {}, []
    with Progress(f"evaluate on {config.split}", reader.rows, "pictures") as progress:
        for batch in reader.batches(reader.in_order(config.batch_size)):
            for position, (caption,) in enumerate(caption_pixels(model, batch.pixels, decoding)):
                image_id = batch.image_ids[position]
                captions[image_id], references[image_id] = caption.text, batch.captions[position]
                shown = {"image_id": image_id, "file_name": batch.file_names[position], "caption": caption.text}
                gallery.append({**shown, "jpeg": batch.jpegs[position]})
            progress.advance(len(batch.image_ids))
    scores = score_captions(captions, references)
    training = model.training_record
    evaluation = dataclasses.replace(
        _evaluation(training.get("name", "model"), source, config.split, captions, scores, decoding.to_dict()),
        data_fingerprint=manifest.fingerprint,
        # A registered model was judged in its own run before it was registered; this judgement is another pipeline's.
        mlflow_run_id=None if source.startswith("models:/") else training.get("mlflow_run_id"),
        examples=[{name: str(row[name]) for name in ("file_name", "caption")} for row in gallery[:3]],
        packages={name: importlib.metadata.version(name).split("+")[0] for name in PACKAGES},  # not torch's +cpu
    )
    return evaluation, captions, references, scores, gallery


def _evaluation(
    name: str, model: str, split: str, captions: Mapping[int, str], scores: Scores, decoding: dict[str, Any]
) -> Evaluation:
    return Evaluation(
        name=name,
        model=model,
        split=split,
        pictures=len(captions),
        scores=scores.scores,
        shuffled_cider=scores.shuffled_cider,
        tokenizer=scores.tokenizer,
        missing=scores.missing,
        decoding=decoding,
    )


def _write(
    output: str,
    evaluation: Evaluation,
    captions: Mapping[int, str],
    references: Mapping[int, list[str]],
    scores: Scores,
    gallery: list[dict],
    tracking: Tracking,
) -> None:
    from model_lib.report import render_report

    results = [{"image_id": image_id, "caption": caption} for image_id, caption in sorted(captions.items())]
    storage.write_json(storage.join(output, "results.json"), results)
    html = render_report(evaluation, captions, references, scores.per_picture, gallery)
    storage.write_bytes(storage.join(output, "report.html"), html.encode())
    storage.write_json(storage.join(output, "scores.json"), evaluation.to_dict())
    if evaluation.mlflow_run_id is not None:
        named = {f"{evaluation.split}_{name}": value for name, value in evaluation.scores.items()}
        named[f"{evaluation.split}_CIDEr_shuffled"] = evaluation.shuffled_cider
        tracking.add(evaluation.mlflow_run_id, named, {"evaluation/report.html": html.encode()})
