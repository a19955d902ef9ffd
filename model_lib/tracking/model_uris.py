"""What `models:/…` means: a version or an alias in MLflow's model registry, and the captioner's
files behind it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from model_lib.errors import UserError, WorkError
from model_lib.io.remote_cache import cached
from model_lib.tracking.mlflow_run import answered, reason

_Answer = TypeVar("_Answer")

MODEL = "captioner"
"""The registered model."""
CHAMPION_URI = f"models:/{MODEL}@champion"
"""Its version that serves, whichever that is."""


def version_uri(version: str) -> str:
    """Return the model URI of a version, which names it for good."""
    return f"models:/{MODEL}/{version}"


def pin_version(source: str) -> str:
    """Return `models:/NAME/VERSION` for `models:/NAME@ALIAS`, and other sources unchanged.

    Raises:
        UserError: the registry has none, or the URI means another version at another time, as
            `models:/NAME/latest`.
        WorkError: the registry fails.
    """
    if not source.startswith("models:/"):
        return source
    if "@" not in source:
        name, slash, version = source.removeprefix("models:/").partition("/")
        if slash and not version.isdigit():
            raise UserError(
                f"{source}: {version!r} is no version; use models:/{name}/1, or "
                f"models:/{name}@champion"
            )
        return source
    name, alias = source.removeprefix("models:/").split("@", 1)
    version = _asked(source, lambda client: client.get_model_version_by_alias(name, alias)).version
    return f"models:/{name}/{version}"


def require_version(source: str) -> None:
    """Raise `UserError` unless the registry has the model of a `models:/…` URI."""
    name, _, version = pin_version(source).removeprefix("models:/").partition("/")
    _asked(source, lambda client: client.get_model_version(name, version))


def _asked(source: str, question: Callable[[Any], _Answer]) -> _Answer:
    """Return what the registry answers to a question about a model, which is given MLflow's client.

    Raises:
        UserError: it has no such model.
        WorkError: it fails itself.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    uri = mlflow.get_tracking_uri()
    try:
        return answered(uri, lambda: question(mlflow.MlflowClient()))
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise UserError(
                f"{source}: not in the model registry at {uri}; register a model first"
            ) from error
        raise WorkError(f"{source}: MLflow at {uri}: fails: {reason(error)}") from error


def download_model(source: str) -> str:
    """Return a local folder with the captioner of a `models:/…` URI; `UserError` if the registry
    has none.

    That of a server is kept in the cache (see `remote_cache.cached`), whole, until it is removed
    from there.
    """
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
    from mlflow.store.artifact.models_artifact_repo import ModelsArtifactRepository

    files = _asked(source, lambda _: ModelsArtifactRepository(source).repo)
    folder = (
        Path(files.artifact_dir) if isinstance(files, LocalArtifactRepository) else _kept(files)
    )
    captioner = captioner_in(folder)
    if captioner is None:
        raise UserError(f"{source}: is a registered model, but not a captioner")
    return str(captioner)


def _kept(files: Any) -> Path:
    """Return a folder of the cache with the files of one of MLflow's stores, which never change
    where they are."""
    import mlflow

    place = [mlflow.get_tracking_uri(), files.artifact_uri]
    return cached(place, lambda part: files.download_artifacts("", str(part)))


def captioner_in(files: Path) -> Path | None:
    """Return the captioner's folder among the files of an MLflow model, or None if it holds
    none."""
    return next((config.parent for config in sorted(files.glob("artifacts/*/config.json"))), None)
