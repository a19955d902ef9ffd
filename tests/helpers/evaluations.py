"""Results of evaluations whose scores a test chooses."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np

from model_lib.evaluate.result import Evaluation, EvaluationResult, Predictions
from model_lib.registry.config import RegisterConfig
from model_lib.registry.registry import register
from model_lib.scores.significance import corpus_scores, intervals
from model_lib.tracking.server import MlflowTracking
from tests.helpers.services import empty_store

IMAGES = 200


def make_evaluation(name: str, statistics: dict[str, np.ndarray], **changes: Any) -> Evaluation:
    """Return an evaluation with the scores of these statistics, float64 [images, 1] each."""
    evaluation = Evaluation(
        name=name,
        model=f"runs/{name}",
        split="val",
        images=len(statistics["CIDEr"]),
        scores=corpus_scores(statistics),
        intervals=intervals(statistics),
        shuffled_cider=0.1,
        frequencies="these",
        diversity={},
        tokenizer="PTB",
        missing={},
        decoding={"num_beams": 5, "top_p": None},
        images_per_second=10.0,
        data_fingerprint="f",
    )
    return replace(evaluation, **changes)


def evaluated(
    cider: float, name: str = "a", noise: float = 0.0, rouge: float = 0.3, **changes: Any
) -> EvaluationResult:
    """Return a model's result.

    Args:
        cider, rouge: the mean scores of its images. How hard each image is, is the same for all
            models.
        noise: standard deviation of what else its images' CIDEr differ in, of each name's own.
        changes: other values of its `Evaluation`.
    """
    difficulty = np.random.default_rng(0).normal(0, 0.3, (IMAGES, 1))
    own = np.random.default_rng(len(name) + 1).normal(0, 1, (IMAGES, 1)) * noise
    statistics = {
        "CIDEr": cider + (difficulty - difficulty.mean()) + (own - own.mean()),
        "ROUGE_L": np.full((IMAGES, 1), rouge),
    }
    texts = ["a dog"] * IMAGES
    predictions = Predictions(list(range(IMAGES)), texts, texts, [texts[:1]] * IMAGES, statistics)
    return EvaluationResult(make_evaluation(name, statistics, **changes), predictions)


def write_evaluation(
    folder: Path, cider: float, name: str, *, model: object, **changes: Any
) -> str:
    """Write the folder of an evaluation, FOLDER/NAME, as evaluate does; return its path."""
    evaluated(cider, name, model=str(model), **changes).write(str(folder / name), "")
    return str(folder / name)


def new_registry(folder: Path, model: Path, **changes: Any) -> str:
    """Return the URI of a new embedded MLflow store in `folder` in which a model is champion;
    changes are to values of its `Evaluation`."""
    uri = empty_store(folder)
    artifacts = str(folder / "artifacts")
    experiment = mlflow.MlflowClient(uri).create_experiment(
        "captioner", artifact_location=artifacts
    )
    register_champion(MlflowTracking(uri, experiment), folder, model, **changes)
    return uri


def register_champion(tracking: MlflowTracking, folder: Path, model: Path, **changes: Any) -> None:
    """Make a model the champion of a registry that has none."""
    evaluation = write_evaluation(folder, 0.5, "small", model=model, **changes)
    register(RegisterConfig(evaluations=(evaluation,)), tracking)
    mlflow.set_tracking_uri(None)  # registering names the store in the environment
