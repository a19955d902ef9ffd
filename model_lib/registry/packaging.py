"""The captioner as a self-contained MLflow model.

It has weights, code, signature, input example, requirements and model card.
"""

import base64
import importlib.metadata
import io
import tempfile
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from PIL import Image

import model_lib
from model_lib.errors import UserError
from model_lib.evaluate.report import DIVERSITY
from model_lib.evaluate.result import Evaluation
from model_lib.io import storage
from model_lib.model.config import DecodeConfig
from model_lib.model.sources import read_training, weights_digest
from model_lib.pages.page import render_markdown
from model_lib.presets import PRESETS
from model_lib.registry.model_uris import MODEL, captioner_in
from model_lib.tracking.server import MlflowTracking

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

STORES = ("aiohttp", "requests", "gcsfs", "s3fs")
"""Packages that read http addresses and buckets, pinned if they are installed."""
SCORES = "scores.json"
"""File of an MLflow model with its evaluation."""
LONGEST_CARD = 5000
"""Characters that MLflow's database holds of a description."""


def render_card(winner: Evaluation, folder: str) -> str:
    """Return the model card, Markdown, of the model in `folder` with its evaluation."""
    values = card_values(folder, read_training(folder).get("configuration", {}))
    return render_markdown("card.md", evaluation=winner, **values)


def card_values(folder: str, training: dict[str, Any]) -> dict[str, Any]:
    """Return what a card's template needs besides an evaluation.

    Args:
        folder: of the model.
        training: the configuration of its training, as far as the card shows it.
    """
    config = storage.read_json(storage.join(folder, "config.json"))
    preset = PRESETS.get(training.get("preset", ""))
    start = training.get("init_from")
    names = {}
    for part in ("vision", "decoder"):
        name = training.get(part) or getattr(preset, part, None) or "of its own"
        names[part] = f"as in {start}" if start else name
    return {
        "training": training,
        "data_fingerprint": read_training(folder).get("data_fingerprint"),
        "names": names,
        "scratch": config.get("train_everything", False),
        "stretched": config.get("image_stretch", False),
        "vision": config.get("vision_config", {}),
        "decoder": config.get("decoder_config", {}),
        "labels": {name: f"{label} ({meaning})" for name, (label, _, meaning) in DIVERSITY.items()},
        "version": model_lib.__version__,
    }


def require_evaluated(evaluation: Evaluation, folder: str) -> None:
    """Raise `UserError` if a folder holds other weights than those that were evaluated."""
    if evaluation.weights is not None and weights_digest(folder) != evaluation.weights:
        message = "holds other weights than those that were evaluated; evaluate it again"
        raise UserError(f"{evaluation.model}: {message}")


def signature() -> "ModelSignature":
    """Return the signature: captions out, and the options of decoding. MLflow has no type for
    images in any form, so it leaves them to the model as they are."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    types = get_type_hints(DecodeConfig)
    params = []
    for field in fields(DecodeConfig):
        if field.name != "num_captions":  # a row has one caption
            dtype = "long" if int in get_args(types[field.name] | None) else "double"
            params.append(ParamSpec(field.name, dtype, field.default))
    return ModelSignature(outputs=Schema([ColSpec("string")]), params=ParamSchema(params))


def example() -> list[str]:
    """Return an input example: one white image of 8 x 8 pixels, a PNG in base64."""
    encoded = io.BytesIO()
    Image.new("RGB", (8, 8), "white").save(encoded, "PNG")
    return [base64.b64encode(encoded.getvalue()).decode()]


def requirements(winner: Evaluation) -> list[str]:
    """Return the pinned packages with which the model was evaluated, and `STORES`."""
    versions = {"mlflow": importlib.metadata.version("mlflow-skinny"), **winner.packages}
    for package in STORES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return [f"{package}=={version}" for package, version in versions.items()]


def log_model(
    winner: Evaluation, folder: str, card: str, run_id: str, tracking: MlflowTracking
) -> str:
    """Upload the model in `folder`, with its evaluation and card, to its MLflow run; return its id.

    `mlflow.pyfunc.log_model` would caption the input example, and a process that registers has no
    torch.

    Raises:
        UserError: the folder holds other weights than those that were evaluated.
    """
    import mlflow
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus
    from mlflow.models import Model

    mlflow.set_tracking_uri(tracking.uri)
    client = tracking.client
    with tempfile.TemporaryDirectory() as scratch:
        files, model = Path(scratch, "model"), Model(run_id=run_id)
        mlflow.pyfunc.save_model(
            str(files),
            mlflow_model=model,
            python_model=str(Path(__file__).parent / "serving.py"),
            artifacts={"model": folder},
            code_paths=[str(Path(model_lib.__file__).parent)],
            pip_requirements=requirements(winner),
            signature=signature(),
            input_example=example(),
        )
        require_evaluated(winner, str(captioner_in(files)))
        storage.write_json(str(files / SCORES), winner.to_dict())
        logged = client.create_logged_model(
            client.get_run(run_id).info.experiment_id, name=MODEL, source_run_id=run_id
        )
        model.model_id = model.model_uuid = logged.model_id
        model.artifact_path = logged.artifact_location
        model.save(str(files / "MLmodel"))
        (files / "README.md").write_text(card)
        status = LoggedModelStatus.FAILED
        try:
            client.log_model_artifacts(logged.model_id, str(files))
            status = LoggedModelStatus.READY
        finally:
            client.finalize_logged_model(logged.model_id, status)
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    return logged.model_id
