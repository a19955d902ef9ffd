"""The pipeline's steps Candidates and Register as pipelines run them: with a secret, after a kill,
late."""

from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest
from kfp import dsl

from components.candidates.component import candidates
from components.register.component import register as step
from model_lib.data.shards import read_manifest
from model_lib.registry.config import NO_CHAMPION, RegisterConfig
from model_lib.registry.registry import register
from model_lib.tracking.server import require_mlflow, tracking_from_environment
from tests.helpers.evaluations import evaluated

Registers = Callable[[str, str], str]


@pytest.fixture()
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[mlflow.MlflowClient]:
    """A registry of its own, that the environment names."""
    for name in ("MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID", "KFP_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    yield mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")


@pytest.fixture()
def registers(tmp_path: Path) -> Registers:
    """A function that runs the step on a winner's evaluation and the champion's."""

    def run(winner: str, champion: str) -> str:
        made = [
            kind(uri=str(tmp_path / kind.__name__)) for kind in (dsl.Markdown, dsl.HTML, dsl.Model)
        ]
        for artifact in made:
            artifact.path = artifact.uri
        rule = {"metric": "CIDEr", "min_gain": 0.0, "max_regression": 0.05, "max_slowdown": 0.5}
        outputs = dict(zip(("decision", "page", "model"), made, strict=True))
        run = {"run_name": "nightly", "images": ""}
        return str(
            step.python_func(
                **run, evaluations=[winner], champion_evaluation=champion, **rule, **outputs
            )
        )

    return run


def test_register_is_run_again_runs_late_and_runs_where_nobody_serves(
    store: mlflow.MlflowClient,
    registers: Registers,
    saved_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def evaluation(name: str, cider: float, model: object = saved_model) -> str:
        evaluated(cider, name, model=str(model)).write(str(tmp_path / name), "")
        return str(tmp_path / name)

    def decision_page() -> str:
        return (tmp_path / "Markdown").read_text()

    assert registers(evaluation("first", 0.5), NO_CHAMPION) == "models:/captioner/1"
    assert "## Version 1 (first) is the champion now" in decision_page()

    # It is killed when the second is champion. Submitted again, the winner's evaluation comes from
    # KFP's cache, and the evaluate finds the second to be champion.
    second, first_evaluated = (
        evaluation("second", 0.6),
        evaluation("first-evaluated", 0.5, "models:/captioner/1"),
    )
    config = RegisterConfig(evaluations=(second,), champion_evaluation=first_evaluated)
    made = register(config, require_mlflow(tracking_from_environment()))
    assert made.promoted and "champion until now" in Path(made.page).read_text()
    second_evaluated = evaluation("second-evaluated", 0.6, "models:/captioner/2")
    for page_was_written in (True, False):
        if not page_was_written:
            Path(made.page).unlink()
        store.set_model_version_tag("captioner", "2", "decision", "pending")
        assert registers(second, second_evaluated) == "models:/captioner/2"
        assert decision_page().startswith(
            f"## Version 2 (second) is the champion now\n\n{made.reason}\n"
        )
        page = (tmp_path / "HTML").read_text()
        assert made.reason[:20] in page and ("champion until now" in page) == page_was_written
        tags = store.get_model_version("captioner", "2").tags
        assert (tags["decision"], tags["replaced"], tags["reason"]) == (
            "champion",
            "1",
            made.reason,
        )
    assert len(store.search_model_versions("name = 'captioner'")) == 2

    # Another run's winner became champion after the evaluate had looked.
    for name, champion, against in (
        ("third", first_evaluated, "version 1"),
        ("fourth", NO_CHAMPION, "none"),
    ):
        assert registers(evaluation(name, 0.9), champion) == "models:/captioner/2"
        reason = (
            f"version 2 became champion while this one was evaluated against {against}: evaluate "
            "them again"
        )
        assert f"({name}) does not replace version 2\n\n{reason}\n" in decision_page()
        assert reason in (tmp_path / "HTML").read_text()

    store.delete_registered_model_alias("captioner", "champion")
    with pytest.raises(SystemExit, match="1"):
        registers(evaluation("fifth", 0.9), second_evaluated)
    assert "models:/captioner@champion: nothing serves: " in (line := capsys.readouterr().err)
    assert "version 5 is a challenger" in line
    reason = (
        "version 2 is not the champion any more, against which this one was evaluated: "
        "evaluate them again"
    )
    assert (
        f"## Version 5 (fifth) is a challenger, and there is no champion\n\n{reason}\n"
        in decision_page()
    )
    assert reason in (tmp_path / "HTML").read_text()
    assert registers(evaluation("sixth", 0.3), NO_CHAMPION) == "models:/captioner/6"


def test_a_candidate_starts_from_the_champion_that_the_secrets_server_has(
    store: mlflow.MlflowClient,
    registers: Registers,
    data: Path,
    saved_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    evaluated(0.5, "first", model=str(saved_model)).write(str(tmp_path / "first"), "")
    registers(str(tmp_path / "first"), NO_CHAMPION)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # as in a pod
    monkeypatch.setenv("CAPTIONER_MLFLOW_TRACKING_URI", store.tracking_uri)
    mlflow.set_tracking_uri(None)
    (tmp_path / "pod").mkdir()
    monkeypatch.chdir(tmp_path / "pod")
    common = {"preset": "tiny", "vision": "", "decoder": "", "tokenizer": "", "precision": "auto"}
    numbers = {"epochs": 0, "batch_size": 0, "learning_rate": 0.0}
    listed = [{"name": "on", "init_from": "models:/captioner@champion"}]
    fingerprint = read_manifest(str(data)).fingerprint
    (document,) = candidates.python_func(
        str(data), fingerprint, str(tmp_path / "c"), "", listed, **common, **numbers
    )
    assert document["options"]["init_from"] == "models:/captioner/1"
