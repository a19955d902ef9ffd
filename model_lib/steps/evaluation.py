"""Evaluating in a pipeline: a candidate, or the champion on the same data."""

from dataclasses import replace

from model_lib.data.shards import read_manifest
from model_lib.evaluate.evaluation import evaluate
from model_lib.evaluate.result import Evaluation
from model_lib.io import storage
from model_lib.registry.config import NO_CHAMPION
from model_lib.registry.model_uris import version_uri
from model_lib.registry.registry import champion_version
from model_lib.steps.form import Options, evaluate_config
from model_lib.tracking.runs import NO_TRACKING, Tracking
from model_lib.tracking.server import require_mlflow


def evaluate_model(
    model: str, data: str, root: str, options: Options, tracking: Tracking
) -> tuple[Evaluation, str]:
    """Evaluate a model; return the evaluation and its folder under `root`.

    The folder's name contains a hash of the options and the data.
    """
    config = evaluate_config(options, model, data, root)
    folder = storage.join(root, f"evaluation-{config.key(read_manifest(data).fingerprint)}")
    return evaluate(replace(config, output=folder), tracking), folder


def evaluate_champion(data: str, root: str, options: Options, tracking: Tracking) -> str:
    """Evaluate the champion on `data`; return its evaluation's folder, `NO_CHAMPION` if there is
    no champion yet."""
    version = champion_version(require_mlflow(tracking).uri)
    if version is None:
        return NO_CHAMPION
    root = storage.join(root, "champions")
    return evaluate_model(version_uri(version), data, root, options, NO_TRACKING)[1]
