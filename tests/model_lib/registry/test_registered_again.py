"""A registration that is started again, as Argo does with a pod that is lost: it finds its version
again."""

import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from model_lib import UserError
from model_lib.registry import registry
from model_lib.registry.config import RegisterConfig
from model_lib.registry.model_uris import MODEL
from model_lib.registry.registry import champion_version, register
from model_lib.registry.versions import rollback
from model_lib.tracking.server import MlflowTracking, require_mlflow, tracking_from_environment
from tests.helpers.evaluations import write_evaluation
from tests.helpers.services import empty_store
from tests.helpers.warm_python import warm_python

KILLED = """
import os, signal, sys
from mlflow import MlflowClient
from model_lib.registry import registry
from model_lib.registry.config import RegisterConfig
from model_lib.tracking.server import tracking_from_environment
def kill(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
def kill_at_decision(client, name, version, key, value, set_tag=MlflowClient.set_model_version_tag):
    kill() if key == "decision" else set_tag(client, name, version, key, value)
if sys.argv[1] == "decision tag":
    MlflowClient.set_model_version_tag = kill_at_decision
else:
    setattr(registry, sys.argv[1], kill)
registry.register(RegisterConfig(evaluations=(sys.argv[2],)), tracking_from_environment())
"""


@pytest.fixture()
def tracking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowTracking:
    monkeypatch.setattr("model_lib.registry.registry.SETTLE", 0.0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", empty_store(tmp_path))
    return require_mlflow(tracking_from_environment())


def decisions(tracking: MlflowTracking) -> dict[str, str | None]:
    """Return the tag `decision` of each version."""
    versions = tracking.client.search_model_versions(f"name = '{MODEL}'")
    return {str(version.version): version.tags.get("decision") for version in versions}


def test_the_same_evaluation_finds_its_version_whether_it_won_or_not(
    saved_model: Path, tracking: MlflowTracking, tmp_path: Path
) -> None:
    first = RegisterConfig(evaluations=(write_evaluation(tmp_path, 0.5, "a", model=saved_model),))
    won = register(first, tracking)
    assert register(first, tracking) == won and won.promoted

    # A second run: Train and Evaluate come from KFP's cache, and the champion that is evaluated is
    # the same model.
    champion = write_evaluation(tmp_path, 0.5, "champion", model=f"models:/{MODEL}/1")
    assert register(replace(first, champion_evaluation=champion), tracking) == won
    assert decisions(tracking) == {"1": "champion"}

    worse = write_evaluation(tmp_path, 0.45, "worse", model=saved_model)
    second = RegisterConfig(evaluations=(worse,), champion_evaluation=champion)
    lost = register(second, tracking)
    Path(lost.page).unlink()
    assert register(second, tracking) == lost and not lost.promoted
    assert Path(lost.page).exists()
    assert decisions(tracking) == {"1": "champion", "2": "challenger"}

    better = write_evaluation(tmp_path, 0.6, "better", model=saved_model)
    third = replace(second, evaluations=(better,))
    assert not register(replace(third, min_gain=0.2), tracking).promoted
    assert register(third, tracking).promoted, "another policy is another question"
    assert [*decisions(tracking).values()].count("challenger") == 2
    with pytest.raises(UserError, match="there is a champion, version 4, to be evaluated on the"):
        register(first, tracking)  # it was champion once, and is not now

    rollback(tracking)
    again = register(third, tracking)
    assert (again.version, again.promoted) == ("5", True), "it is decided anew"


@pytest.mark.parametrize(
    ("moment", "present"), [("_set_alias", None), ("decision tag", "1"), ("render_report", "1")]
)
def test_a_registration_that_was_killed_goes_on_with_its_version(
    saved_model: Path, tracking: MlflowTracking, tmp_path: Path, moment: str, present: str | None
) -> None:
    evaluation = write_evaluation(tmp_path, 0.5, "first", model=saved_model)
    command = [warm_python(), "-c", KILLED, moment, evaluation]
    process = subprocess.run(command, env=dict(os.environ), timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert champion_version(tracking.uri) == present
    assert decisions(tracking) == {"1": "champion" if moment == "render_report" else None}
    registered = register(RegisterConfig(evaluations=(evaluation,)), tracking)
    assert (registered.version, registered.promoted) == ("1", True)
    assert decisions(tracking) == {"1": "champion"} and champion_version(tracking.uri) == "1"
    assert Path(registered.page).exists()


def test_two_pods_that_register_the_same_evaluation_at_once_make_one_version(
    saved_model: Path, tracking: MlflowTracking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = write_evaluation(tmp_path, 0.5, "a", model=saved_model)
    config = RegisterConfig(evaluations=(evaluation,))
    log_model = registry.log_model

    def upload_slowly(*arguments: object) -> str:
        """The other pod is done before this one has uploaded."""
        monkeypatch.setattr(registry, "log_model", log_model)
        assert register(config, tracking).version == "1"
        return log_model(*arguments)

    monkeypatch.setattr(registry, "log_model", upload_slowly)
    registered = register(config, tracking)
    assert (registered.version, registered.promoted) == ("1", True)
    assert decisions(tracking) == {"1": "champion"}
