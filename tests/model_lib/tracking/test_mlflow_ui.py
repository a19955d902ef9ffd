"""MLflow's own pages, in a real browser and over a real server, show what captioner logs."""

import json
from collections.abc import Iterator

import mlflow
import numpy as np
import pytest
from playwright.sync_api import Locator, Page, expect

from model_lib.evaluate.result import Evaluation
from model_lib.evaluate.scorecard import evaluation_metrics, evaluation_tags
from model_lib.tracking.runs import RunData
from model_lib.tracking.server import MlflowTracking
from model_lib.train.config import TrainConfig
from tests.helpers.browser import browser_page
from tests.helpers.evaluations import make_evaluation
from tests.helpers.services import mlflow_server

KFP_ADDRESS = "https://kfp.example.com/#/runs/details/kfp-ui"
SCROLL = """(grids, top) => {
    for (const grid of grids) if (getComputedStyle(grid).overflowY === "auto") grid.scrollTop = top;
}"""
DIGEST = "d" * 36
CIDER = {"five-captions": 1.234, "one-caption": 0.987}


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowTracking]:
    """A pipeline's run with two candidates, trained and evaluated."""
    with (
        mlflow_server(tmp_path_factory.mktemp("mlflow")) as address,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name in ("MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID", "MLFLOW_UI_URL"):
            patch.delenv(name, raising=False)
        tracking = MlflowTracking(address, pipeline_run_id="kfp-ui")
        kfp = {"kfp.pipeline_run_id": "kfp-ui", "kfp.pipeline_run_url": KFP_ADDRESS}
        mlflow.MlflowClient(address).create_run(
            tracking.experiment_id, run_name="nightly", tags=kfp
        )
        tracking.open_pipeline("nightly")
        for name, captions in (("five-captions", 5), ("one-caption", 1)):
            config = TrainConfig(data="data", output=name, name=name, captions_per_image=captions)
            data = [
                RunData(f"coco-{split}", "d" * 64, "gs://bucket/data", context, 1000)
                for split, context in (("train", "training"), ("val", "evaluation"))
            ]
            folder = str(tmp_path_factory.mktemp(name))
            model, params = f"{folder}/best", config.to_dict()
            run = tracking.start(name, None, params, {}, folder, data=data[0], model=model)
            with run:
                for number in range(10):
                    run.log({"train_loss": 5.0 / (number + captions)}, number)
            metrics, tags = evaluation_metrics(evaluation(name)), evaluation_tags(evaluation(name))
            tracking.add(str(run.run_id), metrics, tags, {}, data[1], model)
        metrics = evaluation_metrics(evaluation("five-captions"))
        outcome, winner = {"captioner.winner": "five-captions"}, runs(tracking)["five-captions"]
        tracking.conclude(metrics, outcome, "## Version 1", winner)
        tracking.close_pipeline(succeeded=True)
        yield tracking


def evaluation(name: str) -> Evaluation:
    score = CIDER[name]
    statistics = {"Bleu_4": np.full((2, 1), score / 4), "CIDEr": np.full((2, 1), score)}
    ends = {"Bleu_4": (score / 5, score / 3), "CIDEr": (score - 0.111, score + 0.111)}
    return make_evaluation(name, statistics, intervals=ends)


def runs(tracking: MlflowTracking) -> dict[str, str]:
    logged = mlflow.MlflowClient(tracking.uri).search_runs([tracking.experiment_id])
    return {str(run.info.run_name): str(run.info.run_id) for run in logged}


def test_comparing_two_candidates_shows_what_differs_and_who_is_better(
    tracking: MlflowTracking,
) -> None:
    known = runs(tracking)
    ids = json.dumps([known[name] for name in CIDER])
    with browser_page(height=2000) as page:
        page.set_default_timeout(60_000)
        page.goto(
            f'{tracking.uri}/#/compare-runs?runs={ids}&experiments=["{tracking.experiment_id}"]'
        )
        for part in ("Parameters", "Metrics"):
            page.get_by_role("switch", name=f"{part} - Show diff only").click()
        page.get_by_role("button", name="Visualizations").click()
        text = " ".join(page.locator("body").inner_text().split())
        # Metrics are drawn only where the list is scrolled to, and names follow their values one
        # movement late.
        for step in range(100):
            page.locator(".ReactVirtualized__Grid").evaluate_all(SCROLL, step * 45)
            if page.get_by_text("val_CIDEr_low").is_visible():
                break
            page.wait_for_timeout(100)
        page.locator(".ReactVirtualized__Grid").evaluate_all(SCROLL, step * 45 + 1)
        for _ in range(100):
            boxes = [
                page.get_by_text(text, exact=True).bounding_box()
                for text in ("val_CIDEr", "1.234", "0.987")
            ]
            heights = [box["y"] for box in boxes if box is not None]
            if len(heights) == 3 and max(heights) - min(heights) < 10:
                break
            page.wait_for_timeout(100)
        metrics = " ".join(page.locator("body").inner_text().split())
    assert "Run Name: five-captions one-caption" in text
    assert "captions_per_image 5 1" in text and "learning_rate" not in text
    assert "val_CIDEr val_CIDEr_high val_CIDEr_low" in metrics, "one below the other"
    for end in ("1.345", "1.123", "1.098", "0.876"):
        assert end in metrics
    assert len(heights) == 3 and max(heights) - min(heights) < 10, "in one row"
    assert (
        "captioner.val.decoding num_beams 5" in text and "kfp.pipeline_run_id kfp-ui kfp-ui" in text
    )


def test_the_table_shows_a_pipelines_run_with_its_candidates_under_it(
    tracking: MlflowTracking,
) -> None:
    with browser_page() as page:
        page.set_default_timeout(60_000)
        page.goto(f"{tracking.uri}/#/experiments/{tracking.experiment_id}/runs")
        parent = page.get_by_role("link", name="nightly")
        expect(parent).to_be_visible()
        expect(page.get_by_role("link", name="one-caption")).to_have_count(0)
        page.locator(".ag-row button").first.click()  # opens the pipeline's run
        for name in CIDER:
            for link in page.get_by_role("link", name=name).all():  # its run and its model
                expect(link).to_be_visible()
            expect(cell(page, "Models", name)).to_have_count(1)
        expect(cell(page, "Dataset", f"coco-train ({DIGEST})")).to_have_count(3)
        expect(cell(page, "Dataset", f"coco-val ({DIGEST})")).to_have_count(3)
        expect(cell(page, "Source", "captioner train")).to_have_count(2)
        expect(cell(page, "Source", "captioner pipeline")).to_have_count(1)


def cell(page: Page, column: str, text: str) -> Locator:
    """Return the cells of a column in the table of runs that have a text."""
    return page.locator(f".ag-cell[col-id='attributes.`{column}`']").filter(has_text=text)


def test_a_models_page_has_its_scores_on_their_data(tracking: MlflowTracking) -> None:
    with browser_page(height=2000) as page:
        page.set_default_timeout(60_000)
        page.goto(f"{tracking.uri}/#/experiments/{tracking.experiment_id}/models")
        page.get_by_role("link", name="five-captions").first.click()
        row = page.get_by_role("row").filter(has_text="val_CIDEr_high")
        expect(row).to_contain_text(f"coco-val (#{DIGEST})")
        expect(row).to_contain_text("1.345")


def test_a_pipelines_run_leads_to_kubeflow_and_says_what_came_of_it(
    tracking: MlflowTracking,
) -> None:
    with browser_page() as page:
        page.set_default_timeout(60_000)
        page.goto(
            f"{tracking.uri}/#/experiments/{tracking.experiment_id}/runs/{runs(tracking)['nightly']}"
        )
        link = page.get_by_role("link", name="This run in Kubeflow Pipelines")
        expect(link).to_have_attribute("href", KFP_ADDRESS)
        expect(page.get_by_role("heading", name="Version 1")).to_be_visible()
        expect(page.get_by_text("val_CIDEr_low")).to_be_visible()
        expect(page.get_by_role("link", name="five-captions")).to_be_visible()
