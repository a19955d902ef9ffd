"""The metrics and tags of an evaluation in MLflow.

Names begin with the split, so that they are listed together: `val_CIDEr`, `val_CIDEr_high`, ...
"""

from model_lib.evaluate.result import Evaluation


def evaluation_metrics(evaluation: Evaluation) -> dict[str, float]:
    """Return the metrics: scores with their 95 % intervals, diversity, images, speed."""
    values: dict[str, float] = {}
    for name, value in evaluation.scores.items():  # MLflow's page of a run keeps this order
        low, high = evaluation.intervals[name]
        values |= {name: value, f"{name}_low": low, f"{name}_high": high}
    values |= {**evaluation.figures(), "images": evaluation.images}
    return {f"{evaluation.split}_{name}": float(value) for name, value in values.items()}


def evaluation_tags(evaluation: Evaluation) -> dict[str, str]:
    """Return the tags: model, data and options. MLflow's parameters cannot be set twice."""
    options = [
        f"{name} {value}" for name, value in evaluation.decoding.items() if value is not None
    ]
    values = {
        "model": evaluation.model,
        "decoding": ", ".join(options),
        "data_fingerprint": evaluation.data_fingerprint,
        "tokenizer": evaluation.tokenizer,
        "clip": evaluation.clip,
        "missing": ", ".join(evaluation.missing),
    }
    tags = {f"captioner.{evaluation.split}.{name}": text for name, text in values.items() if text}
    if evaluation.rival:
        tags["captioner.rival"] = evaluation.rival["class"]
    return tags
