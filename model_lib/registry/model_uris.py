"""`models:/…`: a version or an alias in MLflow's model registry, and the captioner's files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from model_lib.errors import UserError
from model_lib.io.remote_cache import cached
from model_lib.tracking.errors import find, mlflow_errors

MODEL = "captioner"
"""The registered model."""
CHAMPION = "champion"
"""Alias of the version that serves."""
CHAMPION_URI = f"models:/{MODEL}@{CHAMPION}"


def version_uri(version: str) -> str:
    """Return the model URI of a version, which names it for good."""
    return f"models:/{MODEL}/{version}"


def pin_version(source: str) -> str:
    """Return `models:/NAME/VERSION` for `models:/NAME@ALIAS` or a version's own URI.

    Raises:
        UserError: the registry has none, or the URI means another version at another time, as
            `models:/NAME/latest`.
        WorkError: the registry fails.
    """
    name, at, alias = source.removeprefix("models:/").partition("@")
    if at:
        version = _look_up(source, lambda client: client.get_model_version_by_alias(name, alias))
        return f"models:/{name}/{version.version}"
    name, slash, number = name.partition("/")
    if slash and not number.isdigit():
        raise UserError(
            f"{source}: {number!r} is no version; use models:/{name}/1, or models:/{name}@champion"
        )
    return source


def require_version(source: str) -> None:
    """Raise `UserError` unless the registry has the model of a `models:/…` URI."""
    name, _, version = pin_version(source).removeprefix("models:/").partition("/")
    _look_up(source, lambda client: client.get_model_version(name, version))


def _look_up(source: str, question: Callable[[Any], Any]) -> Any:
    """Return what MLflow's client answers to a question about a model.

    Raises:
        UserError: there is no such model.
        WorkError: the registry fails.
    """
    import mlflow

    uri = mlflow.get_tracking_uri()
    with mlflow_errors(uri):
        answer = find(lambda: question(mlflow.MlflowClient()))
    if answer is None:
        raise UserError(f"{source}: not in the model registry at {uri}; register a model first")
    return answer


def download_model(source: str) -> str:
    """Return a local folder with the captioner of a `models:/…` URI.

    A server's files are kept in the cache, see `remote_cache.cached`.

    Raises:
        UserError: the registry has no such model, or it is not a captioner.
        WorkError: the registry fails.
    """
    import mlflow
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
    from mlflow.store.artifact.models_artifact_repo import ModelsArtifactRepository

    files = _look_up(source, lambda _: ModelsArtifactRepository(source).repo)
    if isinstance(files, LocalArtifactRepository):
        folder = Path(files.artifact_dir)
    else:
        key = [mlflow.get_tracking_uri(), files.artifact_uri]
        folder = cached(key, lambda part: files.download_artifacts("", str(part)))
    captioner = captioner_in(folder)
    if captioner is None:
        raise UserError(f"{source}: is a registered model, but not a captioner")
    return str(captioner)


def captioner_in(files: Path) -> Path | None:
    """Return the captioner's folder among the files of an MLflow model, or None."""
    return next((config.parent for config in sorted(files.glob("artifacts/*/config.json"))), None)
