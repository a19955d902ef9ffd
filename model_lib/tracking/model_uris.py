"""What `models:/…` means: a version or an alias in MLflow's model registry, and the captioner's files behind it."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from model_lib.errors import UserError

MODEL = "captioner"
"""The registered model."""
CHAMPION_URI = f"models:/{MODEL}@champion"
"""Its version that serves, whichever that is."""


def version_uri(version: str) -> str:
    """Return the model URI of a version, which names it for good."""
    return f"models:/{MODEL}/{version}"


def pin_version(source: str) -> str:
    """Return `models:/NAME/VERSION` for `models:/NAME@ALIAS`, and other sources unchanged."""
    import mlflow
    from mlflow.exceptions import MlflowException

    if not source.startswith("models:/") or "@" not in source:
        return source
    name, alias = source.removeprefix("models:/").split("@", 1)
    try:
        return f"models:/{name}/{mlflow.MlflowClient().get_model_version_by_alias(name, alias).version}"
    except MlflowException as error:
        raise _unknown(source) from error


def require_version(source: str) -> None:
    """Raise `UserError` unless the registry has the model of a `models:/…` URI."""
    import mlflow
    from mlflow.exceptions import MlflowException

    name, _, version = pin_version(source).removeprefix("models:/").partition("/")
    try:
        mlflow.MlflowClient().get_model_version(name, version)
    except MlflowException as error:
        raise _unknown(source) from error


def _unknown(source: str) -> UserError:
    import mlflow

    return UserError(f"{source}: not in the model registry at {mlflow.get_tracking_uri()}; register a model first")


def download_model(source: str) -> str:
    """Return a local folder with the captioner of a `models:/…` URI; `UserError` if the registry has none.

    That of a server is kept in the cache (see `storage.local_folder`), whole, until it is removed from there.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
    from mlflow.store.artifact.models_artifact_repo import ModelsArtifactRepository

    try:
        files = ModelsArtifactRepository(source).repo
    except MlflowException as error:
        raise _unknown(source) from error
    folder = Path(files.artifact_dir) if isinstance(files, LocalArtifactRepository) else _kept(files)
    captioner = captioner_in(folder)
    if captioner is None:
        raise UserError(f"{source}: is a registered model, but not a captioner")
    return str(captioner)


def _kept(files: Any) -> Path:
    """Return a folder of the cache with the files of one of MLflow's stores, which never change where they are."""
    import mlflow

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "captioner"
    place = json.dumps([mlflow.get_tracking_uri(), files.artifact_uri])
    target = cache / hashlib.sha256(place.encode()).hexdigest()[:32]
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=".part-", dir=cache))
        try:
            files.download_artifacts("", str(part))
            with contextlib.suppress(OSError):  # another process may have finished the same files first
                part.rename(target)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return target


def captioner_in(files: Path) -> Path | None:
    """Return the captioner's folder among the files of an MLflow model, or None if it holds none."""
    return next((config.parent for config in sorted(files.glob("artifacts/*/config.json"))), None)
