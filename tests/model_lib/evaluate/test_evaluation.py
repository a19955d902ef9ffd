"""Evaluations of models and of results files: the official scores, and the folder's content."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from model_lib import UserError
from model_lib.errors import WorkError
from model_lib.evaluate.config import EvaluateConfig, ScoreConfig
from model_lib.evaluate.evaluation import evaluate
from model_lib.evaluate.result import Evaluation, EvaluationResult
from model_lib.evaluate.scorecard import evaluation_metrics
from model_lib.evaluate.scoring import score
from model_lib.ingest.config import IngestConfig, ScenesConfig
from model_lib.ingest.ingesting import ingest
from model_lib.ingest.scenes import make_scenes
from model_lib.model.config import DecodeConfig
from model_lib.model.sources import weights_digest
from model_lib.scores.diversity import describe
from model_lib.scores.metrics import Scores, score_captions
from model_lib.scores.significance import corpus_scores, meteor
from model_lib.scores.spice import MODELS
from model_lib.tracking.runs import RunData, Tags, Tracking
from model_lib.train.config import TrainConfig
from model_lib.train.training import train

Run = Callable[..., CompletedProcess]
RIGHT = {1: "a small orange ring", 2: "two red squares here", 3: "dogs", 4: "a cat runs"}
THEIRS = {1: ["a ring", "a small orange ring"], 2: ["a red square"], 3: ["dog"], 4: ["a ring"]}
RIGHT[5], THEIRS[5] = "a ring a ring", ["a ring"]
CAPTIONS = {1: "a dog runs", 2: "a cat sits", 3: "two birds fly"}
REFERENCES = {1: ["a dog runs fast"], 2: ["the cat sits"], 3: ["two birds fly high"]}


def write_coco(
    folder: Path, captions: dict[int, str], references: dict[int, list[str]]
) -> ScoreConfig:
    texts = [(image_id, text) for image_id in references for text in references[image_id]]
    document = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in references],
        "annotations": [
            {"id": n, "image_id": i, "caption": text} for n, (i, text) in enumerate(texts)
        ],
    }
    rows = [{"image_id": i, "caption": text} for i, text in captions.items()]
    results, annotations = folder / "results.json", folder / "annotations.json"
    annotations.write_text(json.dumps(document))
    results.write_text(json.dumps(rows))
    return ScoreConfig(results=str(results), annotations=str(annotations))


@pytest.mark.usefixtures("java")
def test_anyones_results_have_the_official_scores(
    coco_eval: Path, captioner: Run, tmp_path: Path
) -> None:
    expected = json.loads((coco_eval / "expected_scores.json").read_text())
    results, annotations = (coco_eval / expected[name] for name in ("results", "annotations"))
    options = ("--results", results, "--annotations", annotations, "--output", "scored")
    done = captioner("score", *options, "--json")
    assert json.loads(done.stdout)["scores"] == pytest.approx(
        expected["pycocoevalcap_1_2"], abs=1e-6
    ), done.stderr
    evaluation = Evaluation.read(str(tmp_path / "scored"))
    assert json.loads(json.dumps(evaluation.to_dict())) == json.loads(done.stdout)
    assert evaluation.tokenizer == "PTB" and evaluation.images == 1000
    assert evaluation.shuffled_cider < 0.2 * evaluation.scores["CIDEr"]


@pytest.fixture(scope="module")
def with_java() -> Scores:
    """Scores of captions that are word for word right, which METEOR treats apart; the official
    example has none."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PATH", os.environ["PATH_WITH_JAVA"])
        return score_captions(RIGHT, THEIRS)


@pytest.mark.usefixtures("java")
def test_meteor_is_the_official_one_where_captions_are_word_for_word_right(
    with_java: Scores,
) -> None:
    from pycocoevalcap.meteor.meteor import Meteor

    official, each = Meteor().compute_score(THEIRS, {i: [text] for i, text in RIGHT.items()})
    counts = with_java.statistics["METEOR"]
    assert meteor(counts) == pytest.approx(each, abs=1e-12)
    assert meteor(counts.sum(0)) == pytest.approx(official, abs=1e-12) and each[0] == 1


def test_diversity_counts_repeated_and_memorised_captions() -> None:
    captions = ["A red circle.", "a red circle", "two blue squares", "three"]
    training = ["a Red circle", "four green stars"]
    values = describe(captions, [True, True, False, True], training)
    shares = {"distinct": 0.75, "ended": 0.75, "memorised": 0.5}
    assert values == {**shares, "vocabulary": 7, "words": 2.5}
    assert set(describe(captions, [], None)) == {"distinct", "vocabulary", "words"}


@pytest.mark.usefixtures("java")
def test_without_java_meteor_is_missing_and_the_rest_goes_on(
    with_java: Scores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model_lib.scores.metrics.shutil.which", lambda name: None)
    without = score_captions(RIGHT, THEIRS)
    assert "Java" in without.missing["METEOR"] and "METEOR" not in without.statistics
    assert with_java.tokenizer == "PTB" and without.tokenizer == "plain"
    assert without.statistics["CIDEr"] == pytest.approx(with_java.statistics["CIDEr"], rel=1e-6)


def with_limit(folder: Path, kilobytes: int, program: str) -> None:
    """Put a `java` into `folder` whose programs named so have this much address space."""
    limit = f'case "$*" in *{program}*) ulimit -v {kilobytes};; esac'
    script = folder / "java"
    script.write_text(f'#!/bin/sh\n{limit}\nexec {shutil.which("java")} "$@"\n')
    script.chmod(0o755)


@pytest.mark.usefixtures("java")
def test_java_has_enough_in_little_memory(
    with_java: Scores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_limit(tmp_path, 1_000_000, "")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    scores = score_captions(RIGHT, THEIRS)
    assert scores.missing == {} and scores.tokenizer == "PTB"
    assert (scores.statistics["METEOR"] == with_java.statistics["METEOR"]).all()


@pytest.mark.usefixtures("java")
@pytest.mark.parametrize(("program", "tokenizer"), [("-stdio", "PTB"), ("", "plain")])
def test_what_fails_for_want_of_memory_is_missing_with_javas_words_and_the_rest_stays(
    with_java: Scores,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    program: str,
    tokenizer: str,
) -> None:
    with_limit(tmp_path, 400_000, program)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    scores = score_captions(RIGHT, THEIRS)
    assert list(scores.missing) == ["METEOR"]
    reason = scores.missing["METEOR"]
    assert "Could not reserve enough space for" in reason and "give it 1 GB of memory" in reason
    assert scores.tokenizer == tokenizer
    assert scores.statistics["CIDEr"] == pytest.approx(with_java.statistics["CIDEr"], rel=1e-6)
    assert set(scores.statistics) == set(with_java.statistics) - {"METEOR"}


@pytest.mark.usefixtures("java")
def test_spice_that_fails_is_missing_and_the_rest_stays(
    with_java: Scores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_limit(tmp_path, 400_000, "-stdio")  # METEOR would take seconds
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for name in MODELS:
        (tmp_path / name).write_text("no models")
    scores = score_captions(RIGHT, THEIRS, str(tmp_path))
    assert list(scores.missing) == ["METEOR", "SPICE"]
    assert "NoClassDefFound" in scores.missing["SPICE"]
    assert set(scores.statistics) == set(with_java.statistics) - {"METEOR"}


def test_empty_captions_score_nothing_and_break_nothing() -> None:
    scores = score_captions({1: "", 2: "a cat sits", 3: "..."}, REFERENCES)
    cider = scores.statistics["CIDEr"][:, 0]
    assert cider[0] == 0 and cider[1] > 0 and cider[2] == 0
    others = corpus_scores(scores.statistics)
    del others["CIDEr"]
    assert 0 <= min(others.values()) <= max(others.values()) < 1


def test_shuffled_captions_never_stay_with_their_owner() -> None:
    texts = {n: f"word{n} alone" for n in range(7)}
    scores = score_captions(texts, {n: [text] for n, text in texts.items()})
    assert scores.statistics["CIDEr"].mean() > 3 and scores.shuffled_cider < 0.5


@pytest.fixture(scope="module")
def evaluated(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Evaluation]:
    folder = tmp_path_factory.mktemp("evaluated")
    options = {"preset": "tiny", "epochs": 2, "name": "x"}
    trained = train(TrainConfig(data=str(data), output=str(folder), **options))
    output, decode = str(folder / "evaluated"), DecodeConfig(num_beams=2)
    config = EvaluateConfig(model=trained.model, data=str(data), output=output, decode=decode)
    return folder / "evaluated", evaluate(config)


def test_a_model_is_evaluated_on_every_image_of_the_split(
    evaluated: tuple[Path, Evaluation],
) -> None:
    folder, evaluation = evaluated
    assert evaluation.split == "val" and evaluation.images == 12
    assert evaluation.decoding["num_beams"] == 2
    assert evaluation.frequencies == "the reference captions of these 12 images"
    assert evaluation.images_per_second is not None and evaluation.images_per_second > 0
    assert set(evaluation.diversity) == {"distinct", "vocabulary", "words", "ended", "memorised"}
    assert evaluation.intervals.keys() == evaluation.scores.keys()
    for name, (low, high) in evaluation.intervals.items():
        assert low <= evaluation.scores[name] <= high
    assert evaluation.weights == weights_digest(evaluation.model)
    assert Evaluation.read(str(folder)) == evaluation


def test_every_prediction_is_kept_and_some_with_their_attention(
    evaluated: tuple[Path, Evaluation],
) -> None:
    folder, evaluation = evaluated
    predictions = EvaluationResult.read(str(folder)).predictions
    assert predictions.image_ids == list(range(1, 13))
    captions = dict(zip(predictions.image_ids, predictions.captions, strict=True))
    rows = [{"image_id": image_id, "caption": text} for image_id, text in captions.items()]
    assert json.loads((folder / "results.json").read_text()) == rows
    assert predictions.cider().mean() == pytest.approx(evaluation.scores["CIDEr"])
    assert sorted(predictions.views) == predictions.image_ids
    for image_id, view in predictions.views.items():
        assert " ".join(word for word, _ in view.words) == captions[image_id]
        for _, weights in view.words:
            assert weights.shape == (4, 4) and weights.max() == 255


def test_what_the_model_sees_of_an_image_is_kept(saved_model: Path, tmp_path: Path) -> None:
    scenes, data, output = (str(tmp_path / name) for name in ("scenes", "data", "evaluated"))
    make_scenes(ScenesConfig(output=scenes, hard=True, train=2, val=2, size=48))  # 4:3
    ingest(IngestConfig(dataset=scenes, output=data, store="original"))
    evaluate(EvaluateConfig(model=str(saved_model), data=data, output=output))
    views = EvaluationResult.read(output).predictions.views
    assert [view.seen for view in views.values()] == [pytest.approx((75, 100))] * 2


def test_a_folder_that_is_written_in_part_is_none(
    evaluated: tuple[Path, Evaluation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(evaluated[0], tmp_path / "evaluated")

    def full(uri: str, content: bytes) -> None:
        raise OSError(28, "No space left on device", uri)

    monkeypatch.setattr("model_lib.io.storage.write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        EvaluationResult.read(str(folder)).write(str(folder), "")
    with pytest.raises(UserError, match=r"scores\.json: no such file"):
        EvaluationResult.read(str(folder))


def test_the_command_prints_scores_with_intervals_and_warnings(
    captioner: Run, tmp_path: Path
) -> None:
    config = write_coco(tmp_path, CAPTIONS, REFERENCES)
    done = captioner("score", "--results", config.results, "--annotations", config.annotations)
    assert done.returncode == 0, done.stderr
    assert "3 images of" in done.stdout and "CIDEr            " in done.stdout
    assert "only 3 images: CIDEr means little on so few" in done.stderr
    assert "n-grams' frequencies are from the reference captions of these 3 images" in done.stdout


def test_a_models_results_file_has_the_models_scores(
    evaluated: tuple[Path, Evaluation], scenes: Path
) -> None:
    folder, evaluation = evaluated
    annotations = str(scenes / "annotations" / "captions_val2017.json")
    scored = score(ScoreConfig(results=str(folder / "results.json"), annotations=annotations))
    assert scored.scores == pytest.approx(evaluation.scores)


def test_the_report_is_self_contained(evaluated: tuple[Path, Evaluation]) -> None:
    page = (evaluated[0] / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 12
    assert "http://" not in page and "https://" not in page


class Recording(Tracking):
    """Tracking that records what is added."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}

    def add(
        self,
        run_id: str,
        metrics: Mapping[str, float],
        tags: Tags,
        pages: Tags,
        data: RunData | None = None,
        model: str | None = None,
    ) -> None:
        self.metrics |= metrics
        assert data is not None and (data.context, data.images) == ("evaluation", 12)
        assert model is not None and model.endswith("/run/best")
        assert "x, val: 1 at step 2" in pages["evaluation/report.html"]


class Unreachable(Tracking):
    """Tracking by a server that fails."""

    def add(self, *_: object) -> None:
        raise ConnectionError("no answer")


@pytest.fixture()
def tracked(evaluated: tuple[Path, Evaluation], tmp_path: Path) -> dict[str, str]:
    """The options to evaluate a model with an MLflow run and a curve."""
    model = shutil.copytree(evaluated[1].model, tmp_path / "run" / "best")
    record = json.loads((model / "training.json").read_text())
    (model / "training.json").write_text(json.dumps({**record, "mlflow_run_id": "7"}))
    rows = [{"step": n, "time_ms": n, "val_loss": loss} for n, loss in ((1, 2.0), (2, 1.0))]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "run" / "metrics.jsonl").write_text(lines)
    data = record["configuration"]["data"]
    return {"model": str(model), "data": data, "output": str(tmp_path / "evaluated")}


def test_a_tracked_model_has_curves_in_its_report_and_scores_in_its_run(
    tracked: dict[str, str],
) -> None:
    tracking = Recording()
    evaluation = evaluate(EvaluateConfig(**tracked), tracking)
    assert "<polyline" in Path(tracked["output"], "report.html").read_text()
    assert tracking.metrics == evaluation_metrics(evaluation)
    names = {"CIDEr", "CIDEr_shuffled", "diversity_distinct", "images_per_second"}
    assert names <= evaluation.figures().keys()


def test_scores_that_were_not_sent_are_not_sent_for_another_model(
    evaluated: tuple[Path, Evaluation], tracked: dict[str, str]
) -> None:
    config = EvaluateConfig(**tracked, limit=4)
    unsent = Path(tracked["output"], "unsent.json")
    with pytest.raises(WorkError, match="its scores are not in MLflow"):
        evaluate(config, Unreachable())
    assert unsent.exists()
    evaluate(replace(config, model=evaluated[1].model))
    assert not unsent.exists()
    assert evaluate(config, Recording()).model == tracked["model"]


ROW = '{"image_id": 1, "caption": "a"}'


def test_results_of_images_without_names_and_with_ids_as_text_are_scored(tmp_path: Path) -> None:
    texts = {"17": "a dog on the grass", "b7": "a cat on a chair"}
    references = {
        "images": [{"id": image_id} for image_id in texts],
        "annotations": [
            *({"image_id": image_id, "caption": text} for image_id, text in texts.items()),
            {"image_id": "17", "caption": "quality issues", "is_rejected": True},
        ],
    }
    (tmp_path / "a.json").write_text(json.dumps(references))
    rows = [{"image_id": image_id, "caption": text} for image_id, text in texts.items()]
    (tmp_path / "r.json").write_text(json.dumps(rows))
    config = ScoreConfig(results=str(tmp_path / "r.json"), annotations=str(tmp_path / "a.json"))
    assert score(config).scores["ROUGE_L"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", ""),
        ("{}", "holds no captions"),
        ("[]", "holds no captions"),
        ("[1]", "is not COCO results"),
        ('[{"image_id": true, "caption": "a"}]', "is not COCO results"),
        ('[{"image_id": 1}]', "is not COCO results"),
        ('[{"image_id": 9, "caption": "a ghost"}]', "image_id 9 has no reference captions"),
        (f"[{ROW}, {ROW}]", "image_id 1 occurs twice"),
    ],
)
def test_other_results_are_refused(tmp_path: Path, text: str, message: str) -> None:
    config = write_coco(tmp_path, CAPTIONS, REFERENCES)
    Path(config.results).write_text(text)
    with pytest.raises(UserError, match=rf"results\.json.*{message}"):
        score(config)
