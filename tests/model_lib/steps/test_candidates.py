"""The steps Ingest and Register as pipelines run them: with a secret, after a kill, late."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
from kfp import dsl

from components.ingest.component import ingest
from components.register.component import register as step
from model_lib.registry.config import NO_CHAMPION, RegisterConfig
from model_lib.registry.registry import register
from model_lib.tracking.server import require_mlflow, tracking_from_environment
from tests.helpers.evaluations import write_evaluation
from tests.helpers.services import empty_store

Registers = Callable[..., str]


@pytest.fixture()
def store(tmp_path: Path, environment: pytest.MonkeyPatch) -> mlflow.MlflowClient:
    """A registry of its own, which the environment names."""
    environment.setattr("model_lib.registry.registry.SETTLE", 0.0)
    uri = empty_store(tmp_path)
    environment.setenv("MLFLOW_TRACKING_URI", uri)
    return mlflow.MlflowClient(uri)


@pytest.fixture()
def registers(tmp_path: Path) -> Registers:
    """A function that runs the step on a winner's evaluation and the champion's."""

    def run(winner: str, champion: str, images: str = "") -> str:
        outputs: dict[str, Any] = {}
        types = {"decision": dsl.Markdown, "report": dsl.HTML, "model": dsl.Model}
        for name, artifact_type in types.items():
            outputs[name] = artifact_type(uri=str(tmp_path / name))
            outputs[name].path = outputs[name].uri
        options: dict[str, Any] = {"options": {}, "caption_options": {}, "caption_workers": 3}
        evaluations = {"evaluations": [winner], "champion_evaluation": champion}
        options |= {"images": images, "output": str(tmp_path / "out"), **evaluations}
        plan, workers = step.python_func(run_name="r", **options, **outputs)
        expected = [{"plan": plan, "worker": 0, "workers": 1}] if images else [{}]
        assert workers == expected
        return f"models:/captioner/{outputs['decision'].metadata['champion_version']}"

    return run


@pytest.mark.parametrize(("images", "status"), [("", "FINISHED"), ("val2017", "RUNNING")])
def test_register_ends_the_pipelines_run_if_it_is_the_last_step(
    images: str,
    status: str,
    scenes: Path,
    store: mlflow.MlflowClient,
    registers: Registers,
    saved_model: Path,
    tmp_path: Path,
    environment: pytest.MonkeyPatch,
) -> None:
    environment.setenv("KFP_RUN_ID", "kfp-1")
    tracking = require_mlflow(tracking_from_environment())
    tracking.open_pipeline("nightly")
    images = images and str(scenes / images)
    registers(write_evaluation(tmp_path, 0.5, "a", model=saved_model), NO_CHAMPION, images)
    run = tracking.pipeline_run()
    assert run.info.status == status
    assert run.data.tags["captioner.champion_model"] == "models:/captioner/1"


def test_register_is_run_again_runs_late_and_runs_without_a_champion(
    store: mlflow.MlflowClient,
    registers: Registers,
    saved_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def evaluation(name: str, cider: float, model: object = saved_model) -> str:
        return write_evaluation(tmp_path, cider, name, model=model)

    def decision() -> str:
        return (tmp_path / "decision").read_text()

    assert registers(evaluation("first", 0.5), NO_CHAMPION) == "models:/captioner/1"
    assert "## Version 1 (first) is the champion now" in decision()

    # It is killed when the second is champion. Submitted again, the winner's evaluation comes from
    # KFP's cache, and the second is evaluated as the champion.
    second = evaluation("second", 0.6)
    champion_1 = evaluation("champion-1", 0.5, "models:/captioner/1")
    config = RegisterConfig(evaluations=(second,), champion_evaluation=champion_1)
    registered = register(config, require_mlflow(tracking_from_environment()))
    assert registered.promoted and "champion until now" in Path(registered.page).read_text()
    champion_2 = evaluation("champion-2", 0.6, "models:/captioner/2")
    for has_page in (True, False):
        if not has_page:
            Path(registered.page).unlink()
        store.delete_model_version_tag("captioner", "2", "decision")
        assert registers(second, champion_2) == "models:/captioner/2"
        heading = "## Version 2 (second) is the champion now"
        assert decision().startswith(f"{heading}\n\n{registered.reason}\n")
        page = (tmp_path / "report").read_text()
        assert registered.reason[:20] in page and ("champion until now" in page) == has_page
        tags = store.get_model_version("captioner", "2").tags
        assert (tags["decision"], tags["compared_with"]) == ("champion", "1")
        assert tags["reason"] == registered.reason
    assert len(store.search_model_versions("name = 'captioner'")) == 2

    # Another run's winner became champion after the champion was evaluated.
    for name, champion, compared_with in (
        ("third", champion_1, "version 1"),
        ("fourth", NO_CHAMPION, "none"),
    ):
        assert registers(evaluation(name, 0.9), champion) == "models:/captioner/2"
        reason = f"version 2 became champion while it was compared with {compared_with}"
        assert f"({name}) does not replace version 2\n\n{reason}: evaluate again\n" in decision()
        assert reason in (tmp_path / "report").read_text()

    store.delete_registered_model_alias("captioner", "champion")
    with pytest.raises(SystemExit, match="1"):
        registers(evaluation("fifth", 0.9), champion_2)
    error = capsys.readouterr().err
    assert "models:/captioner@champion: there is no champion: " in error
    assert "version 5 is a challenger" in error
    reason = "version 2, with which it was compared, is not the champion any more: evaluate again"
    heading = "## Version 5 (fifth) is a challenger, and there is no champion"
    assert f"{heading}\n\n{reason}\n" in decision()
    assert reason in (tmp_path / "report").read_text()
    assert registers(evaluation("sixth", 0.3), NO_CHAMPION) == "models:/captioner/6"


def test_a_candidate_starts_from_the_champion_that_the_secrets_server_has(
    store: mlflow.MlflowClient,
    registers: Registers,
    scenes: Path,
    saved_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registers(write_evaluation(tmp_path, 0.5, "first", model=saved_model), NO_CHAMPION)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # as in a pod
    monkeypatch.setenv("CAPTIONER_MLFLOW_TRACKING_URI", store.tracking_uri)
    mlflow.set_tracking_uri(None)
    (tmp_path / "pod").mkdir()
    monkeypatch.chdir(tmp_path / "pod")
    listed = [{"name": "on", "init_from": "models:/captioner@champion"}]
    own: dict[str, Any] = {"options": {}, "train_options": {}, "preset": "tiny"}
    dataset = dsl.Dataset(uri=str(tmp_path / "dataset"))
    dataset.path = dataset.uri
    own |= {"data": str(scenes), "output": str(tmp_path / "out"), "dataset": dataset}
    own |= {name: str(tmp_path / name) for name in ("manifest", "fingerprint")}
    (document,) = ingest.python_func(workers=1, candidates=listed, **own)
    assert document["fingerprint"] == (tmp_path / "fingerprint").read_text()
    assert document["options"]["init_from"] == "models:/captioner/1"
