"""Artifacts of a step, for the pages of Kubeflow Pipelines."""

import math
from typing import Any

from model_lib.io.storage import write_bytes


def set_metadata(artifact: Any, **values: Any) -> None:
    """Set an artifact's metadata, without values that are None or not finite, at any depth.

    Kubeflow Pipelines (2.17) refuses these after the step's work, and then fails the step.
    """
    artifact.metadata.update(_storable(values))


def write_model(artifact: Any, *, model: str, **values: Any) -> None:
    """Write a model's source into its artifact, which people see, and into its metadata.

    The artifact's own URI cannot be the model's: the launcher of Kubeflow Pipelines (2.17) fails a
    step after its work if an artifact is outside of the run's folder, and inside it would be a copy
    of gigabytes.
    """
    write_bytes(artifact.path, f"{model}\n".encode())
    set_metadata(artifact, model=model, **values)


def _storable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _storable(inner) for name, inner in value.items() if _is_storable(inner)}
    if isinstance(value, list | tuple):
        return [_storable(inner) for inner in value if _is_storable(inner)]
    return value


def _is_storable(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))
