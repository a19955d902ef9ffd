"""The MLflow registry on a real SQLite store: versions, aliases, and the champion as MLflow loads
it."""

import base64
import json
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest

from model_lib import Captioner, UserError
from model_lib.data.shards import read_manifest
from model_lib.evaluate.result import Evaluation, EvaluationResult
from model_lib.registry.config import RegisterConfig
from model_lib.registry.model_uris import pin_version
from model_lib.registry.registry import champion_version, register
from model_lib.steps.candidates import candidate_config, configure_candidates
from model_lib.steps.evaluation import evaluate_champion, evaluate_model
from model_lib.steps.form import candidate_configs
from model_lib.steps.outcome import decision_markdown
from model_lib.tracking.metrics import read_curves
from model_lib.tracking.server import MlflowTracking
from model_lib.train.config import TrainConfig
from model_lib.train.training import train
from tests.helpers.services import empty_store
from tests.helpers.tracked import step


@pytest.fixture()
def tracking(tmp_path: Path, environment: pytest.MonkeyPatch) -> MlflowTracking:
    environment.setattr("model_lib.registry.registry.SETTLE", 0.0)
    return step(environment, MLFLOW_TRACKING_URI=empty_store(tmp_path))


def candidate(data: Path, folder: Path, tracking: MlflowTracking, name: str, epochs: int) -> str:
    """Train and evaluate a candidate; return its evaluation's folder."""
    config = TrainConfig(
        data=str(data), output=str(folder / name), preset="tiny", epochs=epochs, name=name
    )
    model = train(config, tracking).model
    return evaluate_model(model, str(data), model, {"num_beams": 1}, tracking)[1]


def rescore(folder: str, cider: float) -> str:
    """Give an evaluation this CIDEr on each image, and a speed."""
    result = EvaluationResult.read(folder)
    evaluation, predictions = result.evaluation, result.predictions
    scores = {**evaluation.scores, "CIDEr": cider}
    statistics = {**predictions.statistics, "CIDEr": np.full((evaluation.images, 1), cider)}
    EvaluationResult(
        replace(evaluation, scores=scores, images_per_second=10.0),
        replace(predictions, statistics=statistics),
    ).write(folder, "")
    return folder


def test_the_champion_stays_until_a_better_candidate_comes(
    data: Path, scenes: Path, tmp_path: Path, tracking: MlflowTracking
) -> None:
    client = tracking.client
    first = rescore(candidate(data, tmp_path, tracking, "first", 1), 0.5)
    second = rescore(candidate(data, tmp_path, tracking, "second", 2), 0.4)
    assert evaluate_champion(str(data), str(tmp_path), {"num_beams": 1}, tracking) == "none"

    registered = register(RegisterConfig(evaluations=(first, second)), tracking)
    assert (registered.winner, registered.version, registered.promoted) == ("first", "1", True)
    assert registered.champion_version == "1"
    decision = decision_markdown(registered, tracking)
    assert "## Version 1 (first) is the champion now" in decision
    assert "| second | " in decision and "](" not in decision
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_UI_URL", "https://mlflow.example.com")
        run_id = Evaluation.read(second).mlflow_run_id
        address = f"https://mlflow.example.com/#/experiments/{tracking.experiment_id}/runs/{run_id}"
        assert f"| [second]({address}) | " in decision_markdown(registered, tracking)

    with pytest.raises(UserError, match="there is a champion, version 1, to be evaluated on the"):
        register(RegisterConfig(evaluations=(second,)), tracking)

    def logged_scores() -> int:
        run_id = Evaluation.read(first).mlflow_run_id
        return len(client.get_metric_history(run_id, "val_CIDEr"))

    assert logged_scores() == 1
    champion = rescore(evaluate_champion(str(data), str(tmp_path), {"num_beams": 1}, tracking), 0.5)
    assert logged_scores() == 1, "the champion's evaluation is not its run's"
    assert Evaluation.read(champion).model == "models:/captioner/1"

    config = RegisterConfig(evaluations=(second,), champion_evaluation=champion)
    registered = register(config, tracking)
    assert (registered.version, registered.promoted) == ("2", False)
    assert registered.champion_version == "1"
    assert str(client.get_model_version_by_alias("captioner", "challenger").version) == "2"
    tags = client.get_model_version("captioner", "2").tags
    assert (tags["decision"], tags["compared_with"]) == ("challenger", "1")
    assert "it needed more" in tags["reason"]
    compared = {row["metric"]: row for row in json.loads(tags["comparisons"])}
    assert compared["CIDEr"]["new"] == pytest.approx(0.4)
    assert compared["CIDEr"]["high"] == pytest.approx(-0.1)
    assert registered.page == f"{second}/decision.html"
    assert registered.reason[:40] in Path(registered.page).read_text()
    artifacts = client.list_artifacts(Evaluation.read(second).mlflow_run_id, "evaluation")
    assert "evaluation/decision.html" in [file.path for file in artifacts]

    rescore(second, 0.6)
    registered = register(config, tracking)
    assert (registered.version, registered.promoted) == ("3", True)
    assert registered.champion_version == champion_version(tracking.uri) == "3"
    with pytest.raises(UserError, match=r": evaluates .*first/best, no version of captioner: "):
        register(RegisterConfig(evaluations=(first,), champion_evaluation=first), tracking)

    # MLflow's own way of loading gives the candidate's captions for every form of a row.
    image = scenes / "val2017" / "000000000001.jpg"
    model = Captioner.from_pretrained(str(tmp_path / "second" / "best"))
    caption = model.caption([str(image)])[0].text
    encoded = base64.encodebytes(image.read_bytes()).decode()  # with line breaks
    bare = encoded.replace("\n", "")
    rows = [str(image), image.as_uri(), encoded, bare, f"data:image/jpeg;base64,{bare}"]
    loaded = mlflow.pyfunc.load_model("models:/captioner@champion")
    assert list(loaded.predict(pd.DataFrame({"image": rows}))) == [caption] * 5
    champion_model = Captioner.from_pretrained("models:/captioner@champion")
    assert champion_model.caption([str(image)])[0].text == caption


def test_a_run_has_curves_parameters_and_its_data(
    data: Path, tmp_path: Path, tracking: MlflowTracking
) -> None:
    config = TrainConfig(
        data=str(data), output=str(tmp_path / "run"), preset="tiny", epochs=5, name="curves"
    )
    trained = train(config, tracking)
    client = mlflow.MlflowClient(tracking.uri)
    run = client.get_run(trained.run_id)
    assert run.info.status == "FINISHED" and run.info.run_name == "curves"
    assert run.data.params["preset"] == "tiny" and run.data.params["epochs"] == "5"
    assert len(run.data.tags["captioner.data_fingerprint"]) == 64
    curves = read_curves(trained.model)
    assert [step for step, _ in curves["val_loss"]] == [2, 4, 6, 8, 10]
    for name in ("train_loss", "learning_rate", "images_per_second", "val_loss"):
        points = client.get_metric_history(trained.run_id, name)
        assert [(point.step, point.value) for point in points] == curves[name], name
        assert curves[name][-1][0] == 10


def test_a_run_that_the_server_lost_is_replaced(
    data: Path, tmp_path: Path, tracking: MlflowTracking
) -> None:
    config = {"data": str(data), "output": str(tmp_path / "run"), "preset": "tiny", "epochs": 1}
    first = train(TrainConfig(**config), tracking)
    mlflow.MlflowClient(tracking.uri).delete_run(first.run_id)
    assert train(TrainConfig(**config), tracking).run_id not in (None, first.run_id)


def test_a_champion_that_is_not_there_is_refused_in_one_line(tracking: MlflowTracking) -> None:
    assert champion_version(tracking.uri) is None
    with pytest.raises(UserError, match="not in the model registry") as refused:
        Captioner.from_pretrained("models:/captioner@champion")
    assert "\n" not in str(refused.value)


def test_a_uri_that_means_another_version_later_is_refused() -> None:
    with pytest.raises(UserError, match="'latest' is no version; use models:/captioner/1, or"):
        pin_version("models:/captioner/latest")
    assert pin_version("models:/captioner/3") == "models:/captioner/3"


def test_candidates_have_outputs_of_their_own_and_notice_other_data(data: Path) -> None:
    fingerprint = read_manifest(str(data)).fingerprint

    def configure(*candidates: dict) -> list[dict]:
        configs = candidate_configs(list(candidates), "tiny", {})
        return configure_candidates(configs, str(data), fingerprint, "gs://b/c")

    documents = configure({"name": "a"}, {"name": "b"})
    (other_seed,) = configure({"name": "a", "seed": 1})
    outputs = [candidate_config(document).output for document in (*documents, other_seed)]
    assert len(set(outputs)) == 3 and outputs[0].startswith("gs://b/c/a-")
    # A pipeline has no integers.
    through_json = json.loads(json.dumps(documents[0]), parse_int=float)
    assert candidate_config(through_json) == candidate_config(documents[0])
    with pytest.raises(UserError, match="another run wrote there since"):
        candidate_config({**documents[0], "fingerprint": "0" * 64})
