"""Choosing how a model decodes, on validation images."""

import json
from typing import Any

import numpy as np
import torch

from model_lib.data.leaks import require_unseen
from model_lib.data.shards import SplitReader, read_manifest
from model_lib.evaluate.config import TuneConfig
from model_lib.model.captioner import Captioner
from model_lib.model.decoding import decode
from model_lib.model.sources import lasting_source
from model_lib.model.tokens import decode_tokens
from model_lib.progress import Progress
from model_lib.scores.cider import corpus_cider, words
from model_lib.tracking.runs import NO_TRACKING, Tracking

NAMES = ("num_beams", "length_penalty", "no_repeat_ngram_size")


@torch.inference_mode()
def tune(config: TuneConfig, tracking: Tracking = NO_TRACKING) -> list[dict[str, float]]:
    """Return each combination of options with its CIDEr and mean words a caption, the best first.

    Each image is encoded once. CIDEr splits captions into words plainly; scores to publish come
    from `evaluate`. The table is kept in the model's run in MLflow, as `tuning/decoding.json`.

    Raises:
        UserError: the model or the data cannot be used, or the model was trained on the images.
    """
    manifest, source = read_manifest(config.data), lasting_source(config.model)
    model = Captioner.from_pretrained(source, device=config.device, precision=config.precision)
    record = model.training_record
    require_unseen(record, manifest, config.split)
    reader = SplitReader(manifest, config.split, model.preprocess, limit=config.limit)
    features, references = [], []
    with Progress("encode", reader.rows, "images") as progress:
        for batch in reader.batches(reader.in_order(config.batch_size)):
            pixels = torch.from_numpy(np.stack(batch.pixels)).to(model.device)
            features.append(model.encode(pixels).cpu())
            references += batch.captions
            progress.advance(len(batch.pixels))
    rows = []
    with Progress("tune", len(config.grid), "combinations") as progress:
        for options in config.grid:
            decoded = [
                captions
                for part in features
                for captions in decode(model, part.to(model.device), options)
            ]
            texts = [decode_tokens(model.tokenizer, best.tokens) for best, *_ in decoded]
            row = {name: getattr(options, name) for name in NAMES}
            row["CIDEr"] = corpus_cider(dict(enumerate(texts)), dict(enumerate(references)))
            row["words"] = sum(len(words(text)) for text in texts) / len(texts)
            rows.append(row)
            progress.advance()
    rows.sort(key=lambda row: -row["CIDEr"])
    about: dict[str, Any] = {"model": source, "images": reader.rows, **config.shaping()}
    run_id = record.get("mlflow_run_id")
    if run_id is None and not source.startswith("models:/"):
        run_id = tracking.finished_run(
            record.get("name", "model"), config.key(manifest.fingerprint)
        )
    if run_id is not None:
        table = json.dumps({"configuration": about, "rows": rows}, indent=2)
        tracking.add(run_id, {}, {}, {"tuning/decoding.json": table})
    return rows
