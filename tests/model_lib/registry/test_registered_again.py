"""A registration that is started again, as Argo does with a pod that is lost: it finds the version
it made."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest

from model_lib import UserError
from model_lib.registry.config import RegisterConfig
from model_lib.registry.model_uris import MODEL
from model_lib.registry.registry import register
from model_lib.registry.versions import rollback
from model_lib.tracking.server import MlflowTracking, require_mlflow, tracking_from_environment
from tests.model_lib.registry.test_promotion import evaluated

KILLED = """
import os, signal, sys
from model_lib.registry import registry
from model_lib.registry.config import RegisterConfig
from model_lib.tracking.server import tracking_from_environment
def killed(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
setattr(registry, sys.argv[1], killed)
registry.register(RegisterConfig(evaluations=(sys.argv[2],)), tracking_from_environment())
"""


@pytest.fixture()
def tracking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowTracking:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return require_mlflow(tracking_from_environment())


@pytest.fixture()
def evaluation(saved_model: Path, tmp_path: Path) -> str:
    evaluated(0.5, "first", model=str(saved_model)).write(str(tmp_path / "first"), "")
    return str(tmp_path / "first")


def versions(tracking: MlflowTracking) -> dict[str, str]:
    found = tracking.client.search_model_versions(f"name = '{MODEL}'")
    return {str(version.version): version.tags["decision"] for version in found}


def test_the_same_evaluation_finds_its_version_whether_it_won_or_not(
    saved_model: Path, evaluation: str, tracking: MlflowTracking, tmp_path: Path
) -> None:
    def written(name: str, cider: float, model: object = saved_model) -> str:
        evaluated(cider, name, model=str(model)).write(str(tmp_path / name), "")
        return str(tmp_path / name)

    first = RegisterConfig(evaluations=(evaluation,))
    won = register(first, tracking)
    assert register(first, tracking) == won and won.promoted

    # A second run: Train and Evaluate come from KFP's cache, and the champion that is evaluated is
    # the very model.
    champion = written("champion", 0.5, f"models:/{MODEL}/1")
    assert register(replace(first, champion_evaluation=champion), tracking) == won
    assert versions(tracking) == {"1": "champion"}

    second = RegisterConfig(evaluations=(written("second", 0.45),), champion_evaluation=champion)
    lost = register(second, tracking)
    (tmp_path / "second" / "decision.html").unlink()
    assert register(second, tracking) == lost and not lost.promoted
    assert (tmp_path / "second" / "decision.html").exists()
    assert versions(tracking) == {"1": "champion", "2": "challenger"}

    third = replace(second, evaluations=(written("third", 0.6),))
    assert not register(replace(third, min_gain=0.2), tracking).promoted
    assert register(third, tracking).promoted, "another policy is another question"
    assert versions(tracking) == {
        "1": "champion",
        "2": "challenger",
        "3": "challenger",
        "4": "champion",
    }
    with pytest.raises(
        UserError, match="there is a champion, version 4, to be evaluated on the same data first"
    ):
        register(first, tracking)  # it was champion once, and is not now

    rollback(tracking)
    again = register(third, tracking)
    assert (again.version, again.promoted) == ("5", True), "it is decided anew"


@pytest.mark.parametrize("moment", ["settle", "render_report"])
def test_one_that_was_killed_goes_on_with_its_version(
    evaluation: str, tracking: MlflowTracking, moment: str
) -> None:
    command = [sys.executable, "-c", KILLED, moment, evaluation]
    assert subprocess.run(command, env=dict(os.environ), timeout=120).returncode == -signal.SIGKILL
    assert set(versions(tracking).values()) == {"pending" if moment == "settle" else "champion"}
    registered = register(RegisterConfig(evaluations=(evaluation,)), tracking)
    assert (registered.version, registered.promoted) == ("1", True) and versions(tracking) == {
        "1": "champion"
    }
    assert (
        mlflow.MlflowClient(tracking.uri).get_model_version_by_alias(MODEL, "champion").version == 1
    )
    assert Path(registered.page).exists()
