"""Another project's captioner beside ours: scored, compared and tracked alike, not registered."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from model_lib import UserError
from model_lib.errors import WorkError
from model_lib.evaluate.config import EvaluateConfig
from model_lib.evaluate.evaluation import evaluate
from model_lib.evaluate.result import Evaluation, EvaluationResult
from model_lib.model.config import DecodeConfig
from model_lib.registry.config import RegisterConfig
from model_lib.registry.registry import register
from model_lib.scores.significance import compare
from model_lib.tracking.runs import Tracking
from tests.helpers.rivals import blip
from tests.helpers.tracked import step


@pytest.fixture(scope="module")
def rival(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("rival") / "blip"
    blip(folder)
    return f"hf:{folder}"


def configured(model: object, data: Path, output: Path, **options: object) -> EvaluateConfig:
    sources = {"model": str(model), "data": str(data), "output": str(output)}
    options = {"decode": DecodeConfig(max_new_tokens=8), "precision": "float32", **options}
    return EvaluateConfig(**sources, **options)


@pytest.fixture(scope="module")
def evaluated(rival: str, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    evaluate(configured(rival, data, folder, prompt="a photo of"))
    return folder


def test_a_rival_is_evaluated_as_ours_are(rival: str, evaluated: Path) -> None:
    result = EvaluationResult.read(str(evaluated))
    evaluation = result.evaluation
    assert (evaluation.name, evaluation.model, evaluation.images) == ("blip", rival, 12)
    assert evaluation.rival == {"class": "BlipForConditionalGeneration", "prompt": "a photo of"}
    assert evaluation.intervals.keys() == evaluation.scores.keys()
    assert 0 <= evaluation.diversity["ended"] <= 1 and evaluation.weights is not None
    assert len(result.predictions.views) == 12
    assert not any(view.words for view in result.predictions.views.values())
    page = (evaluated / "report.html").read_text()
    assert "BlipForConditionalGeneration" in page and "a photo of" in page


def test_the_report_compares_several_models_on_the_same_images(
    evaluated: Path, saved_model: Path, data: Path, tmp_path: Path
) -> None:
    evaluation = evaluate(
        configured(saved_model, data, tmp_path / "ours", compare=(str(evaluated),) * 2)
    )
    results = [EvaluationResult.read(str(folder)) for folder in (tmp_path / "ours", evaluated)]
    ours, theirs = (result.predictions.statistics for result in results)
    gain = compare(ours, theirs)["ROUGE_L"]
    page = (tmp_path / "ours" / "report.html").read_text()
    assert page.count("<small title=") == 3 and page.count(">other model<") >= 2
    assert page.count(f'<span class="number">{gain.gain:+.3f}</span>') >= 2
    assert f"how much higher <bdi>{evaluation.name}</bdi> scores" in page


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"limit": 5}, "images"),
        ({"decode": DecodeConfig()}, "decoding"),
        ({"split": "train"}, "split"),
    ],
)
def test_evaluations_of_something_else_are_refused(
    options: dict, difference: str, evaluated: Path, saved_model: Path, data: Path, tmp_path: Path
) -> None:
    config = configured(saved_model, data, tmp_path, compare=(str(evaluated),))
    with pytest.raises(UserError, match=f"differ in {difference} "):
        evaluate(replace(config, **options))
    assert not (tmp_path / "scores.json").exists()


class Server(Tracking):
    """Tracking whose server may be down, and that keeps what it gets."""

    def __init__(self) -> None:
        self.is_down = True
        self.runs: dict[str, tuple[str, Mapping[str, float], Mapping[str, str]]] = {}

    def finished_run(self, name: str, key: str | None = None) -> str | None:
        if self.is_down:
            raise OSError("the server is down")
        assert key is not None
        self.runs.setdefault(key, (name, {}, {}))
        return key

    def add(
        self,
        run_id: str,
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
        files: Mapping[str, str],
        *_: object,
    ) -> None:
        self.runs[run_id] = (self.runs[run_id][0], metrics, tags)


def test_a_rivals_scores_are_sent_later_if_the_server_is_down(
    rival: str, data: Path, tmp_path: Path
) -> None:
    config, server = configured(rival, data, tmp_path), Server()
    with pytest.raises(WorkError, match="the same command sends them"):
        evaluate(config, server)
    written = (tmp_path / "predictions.parquet").stat().st_mtime_ns
    server.is_down = False
    evaluate(config, server)
    assert (tmp_path / "predictions.parquet").stat().st_mtime_ns == written
    ((name, metrics, tags),) = server.runs.values()
    assert name == "blip" and metrics["val_images"] == 12
    assert tags["captioner.rival"] == "BlipForConditionalGeneration"


def test_a_rival_has_one_run_in_mlflow_and_is_not_registered(
    rival: str, data: Path, tmp_path: Path, environment: pytest.MonkeyPatch
) -> None:
    tracking = step(environment, MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/mlflow.db")
    folder = tmp_path / "evaluated"
    for _ in range(2):
        evaluate(configured(rival, data, folder, limit=3), tracking)
    (run,) = tracking.client.search_runs([tracking.experiment_id])
    assert run.info.run_name == "blip" and run.info.status == "FINISHED"
    scores = Evaluation.read(str(folder)).scores
    assert run.data.metrics["val_CIDEr"] == pytest.approx(scores["CIDEr"])
    assert run.data.tags["captioner.rival"] and run.data.tags["captioner.val.model"] == rival
    with pytest.raises(UserError, match="another project's model, which is compared and not"):
        register(RegisterConfig(evaluations=(str(folder),)), tracking)
