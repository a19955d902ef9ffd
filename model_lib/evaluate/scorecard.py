"""What MLflow's table shows of an evaluation.

Names begin with the split, so that they stand together: `val_CIDEr`, `val_CIDEr_high`,
`val_CIDEr_low`, ...
"""

from model_lib.evaluate.result import Evaluation


def evaluation_metrics(evaluation: Evaluation) -> dict[str, float]:
    """Return the metrics: each score with the ends of its 95 % interval, diversity, images and
    speed."""
    values: dict[str, float] = {}
    for name, value in evaluation.scores.items():  # MLflow's page of a run shows them in this order
        low, high = evaluation.intervals[name]
        values |= {name: value, f"{name}_low": low, f"{name}_high": high}
    values |= {**evaluation.figures(), "images": evaluation.images}
    return {f"{evaluation.split}_{name}": float(value) for name, value in values.items()}


def evaluation_tags(evaluation: Evaluation) -> dict[str, str]:
    """Return the tags: what was evaluated, on which data and how. (MLflow's parameters could not be
    evaluated twice.)"""
    values = {
        "model": evaluation.model,
        "decoding": ", ".join(
            f"{name} {value}" for name, value in evaluation.decoding.items() if value is not None
        ),
        "data_fingerprint": evaluation.data_fingerprint,
        "tokenizer": evaluation.tokenizer,
        "clip": evaluation.clip,
        "missing": ", ".join(evaluation.missing),
    }
    return {
        f"captioner.{evaluation.split}.{name}": value for name, value in values.items() if value
    }
