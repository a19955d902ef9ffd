"""What `models:/…` means: a version or an alias in MLflow's model registry, and the captioner's files behind it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_lib.copies import cached
from model_lib.errors import UserError, WorkError, first_line

if TYPE_CHECKING:
    from mlflow.exceptions import MlflowException

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
        UserError: the registry has none, or the URI means another version at another time, as `models:/NAME/latest`.
        WorkError: the registry fails.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    if not source.startswith("models:/"):
        return source
    if "@" not in source:
        name, slash, version = source.removeprefix("models:/").partition("/")
        if slash and not version.isdigit():
            raise UserError(f"{source}: {version!r} is no version; use models:/{name}/1, or models:/{name}@champion")
        return source
    name, alias = source.removeprefix("models:/").split("@", 1)
    try:
        return f"models:/{name}/{mlflow.MlflowClient().get_model_version_by_alias(name, alias).version}"
    except MlflowException as error:
        raise _failed(source, error) from error


def require_version(source: str) -> None:
    """Raise `UserError` unless the registry has the model of a `models:/…` URI."""
    import mlflow
    from mlflow.exceptions import MlflowException

    name, _, version = pin_version(source).removeprefix("models:/").partition("/")
    try:
        mlflow.MlflowClient().get_model_version(name, version)
    except MlflowException as error:
        raise _failed(source, error) from error


def _failed(source: str, error: "MlflowException") -> UserError | WorkError:
    """Return what to raise for what the registry says of a model: it has none, or it fails itself."""
    import mlflow

    if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
        return UserError(f"{source}: not in the model registry at {mlflow.get_tracking_uri()}; register a model first")
    return WorkError(f"{source}: MLflow at {mlflow.get_tracking_uri()}: fails: {first_line(error)}")


def download_model(source: str) -> str:
    """Return a local folder with the captioner of a `models:/…` URI; `UserError` if the registry has none.

    That of a server is kept in the cache (see `copies.cached`), whole, until it is removed from there.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
    from mlflow.store.artifact.models_artifact_repo import ModelsArtifactRepository

    try:
        files = ModelsArtifactRepository(source).repo
    except MlflowException as error:
        raise _failed(source, error) from error
    folder = Path(files.artifact_dir) if isinstance(files, LocalArtifactRepository) else _kept(files)
    captioner = captioner_in(folder)
    if captioner is None:
        raise UserError(f"{source}: is a registered model, but not a captioner")
    return str(captioner)


def _kept(files: Any) -> Path:
    """Return a folder of the cache with the files of one of MLflow's stores, which never change where they are."""
    import mlflow

    place = [mlflow.get_tracking_uri(), files.artifact_uri]
    return cached(place, lambda part: files.download_artifacts("", str(part)))


def captioner_in(files: Path) -> Path | None:
    """Return the captioner's folder among the files of an MLflow model, or None if it holds none."""
    return next((config.parent for config in sorted(files.glob("artifacts/*/config.json"))), None)
