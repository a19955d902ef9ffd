"""Register in two pods at once, as Argo may start it: the same evaluation is one version."""

from pathlib import Path

import pytest

from model_lib.registry import registry
from model_lib.registry.config import RegisterConfig
from model_lib.registry.model_uris import MODEL
from model_lib.tracking.server import MlflowTracking
from tests.helpers.evaluations import evaluated


def test_two_pods_that_register_the_same_evaluation_at_once_make_one_version(
    saved_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated(0.5, model=str(saved_model)).write(str(tmp_path / "evaluation"), "")
    tracking = MlflowTracking(f"sqlite:///{tmp_path}/mlflow.db")
    config = RegisterConfig(evaluations=(str(tmp_path / "evaluation"),))
    log_model = registry.log_model

    def upload_slowly(*arguments: object) -> str:
        """The other pod is done before this one has uploaded."""
        monkeypatch.setattr(registry, "log_model", log_model)
        assert registry.register(config, tracking).version == "1"
        return log_model(*arguments)

    monkeypatch.setattr(registry, "log_model", upload_slowly)
    registered = registry.register(config, tracking)
    assert (registered.version, registered.promoted) == ("1", True)
    (version,) = tracking.client.search_model_versions(f"name = '{MODEL}'")
    assert version.tags["decision"] == "champion"
