"""The MLflow registry, on a real SQLite store: versions, aliases, and the champion loaded as MLflow
loads it."""

import base64
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest

from model_lib import Captioner, UserError
from model_lib.evaluate.config import EvaluateConfig, ScoreConfig
from model_lib.evaluate.evaluation import evaluate
from model_lib.evaluate.result import Evaluation, EvaluationResult
from model_lib.evaluate.scoring import score
from model_lib.model.config import DecodeConfig
from model_lib.registry.config import RegisterConfig
from model_lib.registry.model_uris import pin_version
from model_lib.registry.registry import champion_version, register
from model_lib.steps.candidates import candidate_config, configure_candidates
from model_lib.steps.evaluation import evaluate_champion, evaluate_model
from model_lib.steps.outcome import decision_markdown
from model_lib.tracking.server import MlflowTracking, require_mlflow, tracking_from_environment
from model_lib.train.config import TrainConfig
from model_lib.train.training import train
from tests.helpers.evaluations import evaluated


@pytest.fixture()
def tracking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowTracking]:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    yield require_mlflow(tracking_from_environment())


def candidate(data: Path, folder: Path, tracking: MlflowTracking, name: str, epochs: int) -> str:
    """Train and evaluate a candidate; return its evaluation's folder."""
    config = TrainConfig(
        data=str(data), output=str(folder / name), preset="tiny", epochs=epochs, name=name
    )
    trained = train(config, tracking)
    return evaluate_model(trained.model, str(data), trained.model, tracking, num_beams=1)[1]


def rescore(folder: str, cider: float) -> str:
    """Give an evaluation another CIDEr on each image, and a speed, so that who wins is known."""
    found = EvaluationResult.read(folder)
    scores = {**found.evaluation.scores, "CIDEr": cider}
    evaluation = replace(found.evaluation, scores=scores, images_per_second=10.0)
    each = {**found.predictions.statistics, "CIDEr": np.full((found.evaluation.images, 1), cider)}
    EvaluationResult(evaluation, replace(found.predictions, statistics=each)).write(folder, "")
    return folder


def test_a_champion_reigns_until_a_better_one_comes(
    data: Path, scenes: Path, tmp_path: Path, tracking: MlflowTracking
) -> None:
    first = rescore(candidate(data, tmp_path, tracking, "first", 1), 0.5)
    second = rescore(candidate(data, tmp_path, tracking, "second", 2), 0.4)
    assert evaluate_champion(str(data), str(tmp_path), tracking, num_beams=1) == "none"

    made = register(RegisterConfig(evaluations=(first, second)), tracking)
    assert (made.winner, made.version, made.promoted, made.champion_version) == (
        "first",
        "1",
        True,
        "1",
    )

    shown = decision_markdown(made, tracking)
    assert (
        "## Version 1 (first) is the champion now" in shown
        and "| second | " in shown
        and "](" not in shown
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_UI_URL", "https://mlflow.example.com")
        run_id = Evaluation.read(second).mlflow_run_id
        address = f"https://mlflow.example.com/#/experiments/{tracking.experiment_id}/runs/{run_id}"
        assert f"| [second]({address}) | " in decision_markdown(made, tracking)

    with pytest.raises(
        UserError, match="there is a champion, version 1, to be evaluated on the same data first"
    ):
        register(RegisterConfig(evaluations=(second,)), tracking)

    results, annotations = (
        str(Path(first, "results.json")),
        str(scenes / "annotations" / "captions_val2017.json"),
    )
    score(ScoreConfig(results=results, annotations=annotations, output=str(tmp_path / "alone")))
    with pytest.raises(UserError, match=r"results\.json: no such folder"):
        register(RegisterConfig(evaluations=(str(tmp_path / "alone"),)), tracking)

    run_id = Evaluation.read(first).mlflow_run_id
    results = len(mlflow.MlflowClient(tracking.uri).get_metric_history(run_id, "val_CIDEr"))
    champion = rescore(evaluate_champion(str(data), str(tmp_path), tracking, num_beams=1), 0.5)
    assert (
        len(mlflow.MlflowClient(tracking.uri).get_metric_history(run_id, "val_CIDEr"))
        == results
        == 1
    )
    by_alias = EvaluateConfig(
        model="models:/captioner@champion",
        data=str(data),
        output=str(tmp_path / "by_alias"),
        decode=DecodeConfig(),
    )
    assert evaluate(by_alias).model == "models:/captioner/1"
    made = register(RegisterConfig(evaluations=(second,), champion_evaluation=champion), tracking)
    assert (made.version, made.promoted, made.champion_version) == ("2", False, "1")
    client = mlflow.MlflowClient(tracking.uri)
    assert str(client.get_model_version_by_alias("captioner", "challenger").version) == "2"
    tags = client.get_model_version("captioner", "2").tags
    assert (
        tags["decision"] == "challenger"
        and "it needed more" in tags["reason"]
        and tags["evaluated_against"] == "1"
    )
    compared = {row["metric"]: row for row in json.loads(tags["comparisons"])}
    assert compared["CIDEr"]["new"] == pytest.approx(0.4) and compared["CIDEr"][
        "high"
    ] == pytest.approx(-0.1)
    assert (
        made.page == f"{second}/decision.html" and made.reason[:40] in Path(made.page).read_text()
    )
    run_id = Evaluation.read(second).mlflow_run_id
    assert "evaluation/decision.html" in [
        file.path for file in client.list_artifacts(run_id, "evaluation")
    ]

    made = register(
        RegisterConfig(evaluations=(rescore(second, 0.6),), champion_evaluation=champion), tracking
    )
    assert (made.version, made.promoted, made.champion_version) == ("3", True, "3")
    assert champion_version(tracking.uri) == "3"

    again = register(RegisterConfig(evaluations=(second,), champion_evaluation=champion), tracking)
    assert again == made, "one that was killed when it had decided is started again"
    with pytest.raises(
        UserError, match=r": evaluates .*first/best, no version of captioner: captioner evaluate"
    ):
        register(RegisterConfig(evaluations=(first,), champion_evaluation=first), tracking)

    # MLflow's own way of loading gives the candidate's captions, for a path, a URI and base64
    # alike.
    image = scenes / "val2017" / "000000000001.jpg"
    expected = (
        Captioner.from_pretrained(str(tmp_path / "second" / "best")).caption([str(image)])[0].text
    )
    model = mlflow.pyfunc.load_model("models:/captioner@champion")
    assert list(model.predict([str(image)])) == [expected]
    encoded = base64.encodebytes(
        image.read_bytes()
    ).decode()  # with line breaks, as the base64 command writes it
    bare = encoded.replace("\n", "")
    frame = pd.DataFrame(
        {"image": [str(image), image.as_uri(), encoded, bare, f"data:image/jpeg;base64,{bare}"]}
    )
    assert list(model.predict(frame)) == [expected] * 5
    assert (
        Captioner.from_pretrained("models:/captioner@champion").caption([str(image)])[0].text
        == expected
    )


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
    assert [m.step for m in client.get_metric_history(trained.run_id, "val_loss")] == [
        2,
        4,
        6,
        8,
        10,
    ]
    for name in ("train_loss", "learning_rate", "images_per_second"):
        steps = [m.step for m in client.get_metric_history(trained.run_id, name)]
        assert steps[-1] == 10 and steps == sorted(set(steps)), name  # more where steps are slow


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


def test_a_model_of_a_hub_is_refused_before_anything_is_logged(
    tracking: MlflowTracking, tmp_path: Path
) -> None:
    evaluated(0.5, "far", model="owner/captioner").write(str(tmp_path / "evaluated"), "")
    with pytest.raises(
        UserError, match="owner/captioner: lies on a hub; fetch it into a folder, evaluate it there"
    ):
        register(RegisterConfig(evaluations=(str(tmp_path / "evaluated"),)), tracking)
    assert champion_version(tracking.uri) is None and not tracking.client.search_runs(
        [tracking.experiment_id]
    )


def test_a_name_that_means_another_version_later_is_refused() -> None:
    with pytest.raises(UserError, match="'latest' is no version; use models:/captioner/1, or"):
        pin_version("models:/captioner/latest")
    assert pin_version("models:/captioner/3") == "models:/captioner/3"


def test_candidates_have_places_of_their_own_and_notice_other_data(
    data: Path, tmp_path: Path
) -> None:
    from model_lib.data.shards import read_manifest

    fingerprint = read_manifest(str(data)).fingerprint
    options = {"preset": "tiny", "vision": "", "epochs": 0}
    place = (str(data), fingerprint, "gs://b/c")
    documents = configure_candidates(*place, "", [{"name": "a"}, {"name": "b"}], **options)
    again = configure_candidates(*place, "", [{"name": "a", "seed": 1}], **options)
    (anew,) = configure_candidates(*place, "after files were deleted", [{"name": "a"}], **options)
    assert anew != documents[0] and candidate_config(anew) == candidate_config(documents[0])
    outputs = [candidate_config(document).output for document in (*documents, *again)]
    assert len(set(outputs)) == 3 and outputs[0].startswith("gs://b/c/a-")
    through_json = json.loads(
        json.dumps(documents[0]), parse_int=float
    )  # a pipeline knows no whole numbers
    assert candidate_config(through_json) == candidate_config(documents[0])
    with pytest.raises(UserError, match="another run wrote there since"):
        candidate_config({**documents[0], "fingerprint": "0" * 64})
