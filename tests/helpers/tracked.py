"""A step of a pipeline, as far as tracking is concerned: what its environment says."""

import pytest

from model_lib.tracking.server import MlflowTracking, require_mlflow, tracking_from_environment

NAMES = ["MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID"]
NAMES += ["MLFLOW_UI_URL", "KFP_RUN_ID", "WEBHOOK_URL"]
"""Variables that a step may have."""


def step(environment: pytest.MonkeyPatch, **variables: str) -> MlflowTracking:
    """Return the tracking that a step with these environment variables finds."""
    for name, value in variables.items():
        environment.setenv(name, value)
    return require_mlflow(tracking_from_environment())
