"""MLflow away when a training starts, goes on or ends, when an evaluation is logged or a model is
fetched."""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import mlflow
import pytest

from model_lib.data.shards import read_manifest
from model_lib.errors import WorkError
from model_lib.evaluate.config import EvaluateConfig
from model_lib.evaluate.evaluation import evaluate
from model_lib.model.sources import weights_digest
from model_lib.registry.config import RegisterConfig
from model_lib.registry.model_uris import download_model
from model_lib.registry.registry import register
from model_lib.tracking.errors import FAIL_FAST
from model_lib.tracking.metrics import read_curves
from model_lib.tracking.server import MlflowTracking
from model_lib.train.config import TrainConfig
from model_lib.train.training import train
from tests.helpers.evaluations import write_evaluation
from tests.helpers.services import Faults, faulty_proxy, free_port, mlflow_server
from tests.helpers.steps import before_steps
from tests.helpers.training import train_config


class Server:
    """An MLflow server that can be away: unreachable behind a proxy, which is quick, or stopped."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, self.faults = folder, free_port(), Faults(0.0, seed=0)
        self.running = ExitStack()
        self.address = ""

    def start(self) -> None:
        self.running.enter_context(mlflow_server(self.folder, port=self.port))

    def stop(self) -> None:
        self.running.close()

    def away(self) -> None:
        self.faults.outage(10**6)

    def back(self) -> None:
        self.faults.outage(0)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("mlflow"))
    server.start()
    with faulty_proxy(f"http://127.0.0.1:{server.port}", server.faults) as server.address:
        yield server
    server.stop()


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the pauses."""
    monkeypatch.setattr("model_lib.tracking.mlflow_run.INTERVAL", 0.02)
    monkeypatch.setattr("model_lib.tracking.mlflow_run.LONGEST_PAUSE", 0.1)
    monkeypatch.setenv("CAPTIONER_RETRY_SECONDS", "0.1")


def before_step(
    monkeypatch: pytest.MonkeyPatch, actions: dict[int, Callable[[], None]]
) -> list[int]:
    """Do something before some steps; return the list of the steps that are run."""
    steps: list[int] = []

    def act(step: int) -> None:
        actions.get(step, lambda: None)()
        steps.append(step)

    before_steps(monkeypatch, act)
    return steps


def options(data: Path, output: Path) -> TrainConfig:
    often = {"validate_every": 6, "log_steps": 1, "checkpoint_steps": 1}
    return train_config(data, output, epochs=6, name=output.name, **often)


def only_run(tracking: MlflowTracking, name: str) -> mlflow.entities.Run:
    condition = f"attributes.run_name = '{name}'"
    (run,) = tracking.client.search_runs([tracking.experiment_id], condition)
    return run


def has_all_points(tracking: MlflowTracking, output: Path) -> bool:
    """Whether a training's run in MLflow has each point of its file, once, in order."""
    run_id = only_run(tracking, output.name).info.run_id
    curves = read_curves(f"{output}/best")
    assert [step for step, _ in curves["train_loss"]] == list(range(1, 13))
    assert [step for step, _ in curves["val_loss"]] == [6, 12]
    for name, curve in curves.items():
        points = tracking.client.get_metric_history(run_id, name)
        points.sort(key=lambda point: (point.timestamp, point.step))
        if [(point.step, point.value) for point in points] != curve:
            return False
    return True


def test_away_at_the_start_it_fails_before_any_work(tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    config = TrainConfig(data="nowhere", output=str(tmp_path / "run"))
    message = rf"^MLflow at {address}: fails \(.*Connection refused\); .*nothing was done$"
    with pytest.raises(WorkError, match=message):
        train(config, MlflowTracking(address))
    assert not (tmp_path / "run").exists()


def test_a_server_that_accepts_calls_and_never_answers_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAIL_FAST, "MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    config = TrainConfig(data="nowhere", output=str(tmp_path / "run"))
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        tracking = MlflowTracking(f"http://127.0.0.1:{deaf.getsockname()[1]}")
        with pytest.raises(WorkError, match=r"timed out.*nothing was done"):
            train(config, tracking)


def test_away_in_the_middle_training_goes_on_and_all_points_arrive(
    server: Server, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    # The server may be back before the client has tried three times.
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracking = MlflowTracking(server.address)
    before_step(monkeypatch, {2: server.stop, 10: server.start})
    train(options(data, tmp_path / "middle"), tracking)
    run = only_run(tracking, "middle")
    assert run.info.status == "FINISHED" and len(run.outputs.model_outputs) == 1
    assert has_all_points(tracking, tmp_path / "middle")
    assert caplog.text.count("training goes on, and its points are kept") == 1


def test_away_at_the_end_the_model_is_safe_and_the_same_command_sends_the_points(
    server: Server, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking = MlflowTracking(server.address)
    config, weights = options(data, tmp_path / "end"), tmp_path / "end/best/model.safetensors"
    with monkeypatch.context() as patched:
        before_step(patched, {7: server.away})
        message = r"its model is safe, but not all points of run \w{32} were sent"
        with pytest.raises(WorkError, match=message):
            train(config, tracking)
    best = weights.read_bytes()
    server.back()
    steps = before_step(monkeypatch, {})
    trained = train(config, tracking)
    assert not steps and trained.steps == 12
    run = only_run(tracking, "end")
    assert run.info.run_id == trained.run_id and run.info.status == "FINISHED"
    (output,) = run.outputs.model_outputs
    model = tracking.client.get_logged_model(output.model_id)
    assert model.status == "READY" and model.tags["mlflow.note.content"] == trained.model
    assert has_all_points(tracking, tmp_path / "end") and best == weights.read_bytes()
    train(config, tracking)
    end_time = only_run(tracking, "end").info.end_time
    assert end_time == run.info.end_time, "there was nothing more to send"


def test_killed_while_mlflow_is_away_no_point_is_lost(
    server: Server, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking = MlflowTracking(server.address)
    with monkeypatch.context() as patched:
        before_step(patched, {3: server.away, 8: lambda: os.kill(os.getpid(), signal.SIGTERM)})
        with pytest.raises(SystemExit) as stop:
            train(options(data, tmp_path / "killed"), tracking)
    assert stop.value.code == 143
    server.back()
    steps = before_step(monkeypatch, {})
    train(options(data, tmp_path / "killed"), tracking)
    assert steps == [9, 10, 11] and has_all_points(tracking, tmp_path / "killed")


def test_a_call_that_hangs_holds_up_no_step(
    server: Server, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call ends only before step 11: if a step waited for it, it would never end."""
    hanging, go = threading.Event(), threading.Event()
    tracking = MlflowTracking(server.address)
    log_batch = mlflow.MlflowClient.log_batch

    def hang(client: mlflow.MlflowClient, run_id: str, metrics: Any = (), **others: Any) -> None:
        if metrics and not go.is_set():
            hanging.set()
            assert go.wait(60), "steps were held up"
        log_batch(client, run_id, metrics=metrics, **others)

    monkeypatch.setattr("mlflow.MlflowClient.log_batch", hang)
    before_step(monkeypatch, {2: lambda: hanging.wait(60), 11: go.set})
    train(options(data, tmp_path / "hanging"), tracking)
    assert hanging.is_set() and has_all_points(tracking, tmp_path / "hanging")


def test_away_when_an_evaluation_is_logged_the_same_command_only_sends(
    server: Server, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking = MlflowTracking(server.address)
    model = train(train_config(data, tmp_path / "run", epochs=1, name="e"), tracking)
    folder = tmp_path / "evaluated"
    config = EvaluateConfig(model=model.model, data=str(data), output=str(folder))
    server.away()
    with monkeypatch.context() as patched:
        patched.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        message = r"evaluated: is written, but its scores are not in MLflow \(.*503.*\); the same"
        with pytest.raises(WorkError, match=message):
            evaluate(config, tracking)
        scores = (folder / "scores.json").read_bytes()
        files = {file.name for file in folder.iterdir()}
        assert {"results.json", "report.html", "predictions.parquet"} < files
        patched.setattr("model_lib.model.captioner.Captioner.caption_pixels", None)
        with pytest.raises(WorkError, match="is written, but"):
            evaluate(config, tracking)
        server.back()
        evaluation = evaluate(config, tracking)
    run = tracking.client.get_run(model.run_id)
    assert run.data.metrics["val_CIDEr"] == evaluation.scores["CIDEr"]
    (output,) = run.outputs.model_outputs
    logged = tracking.client.get_logged_model(output.model_id)
    (score,) = (metric for metric in logged.metrics if metric.key == "val_CIDEr")
    inputs = {row.tags[0].value: row.dataset for row in run.inputs.dataset_inputs}
    fingerprint = read_manifest(str(data)).fingerprint
    assert (
        fingerprint.startswith(score.dataset_digest) and score.value == evaluation.scores["CIDEr"]
    )
    assert {context: row.name.rpartition("-")[2] for context, row in inputs.items()} == {
        "training": "train",
        "evaluation": "val",
    }
    assert {row.digest for row in inputs.values()} == {score.dataset_digest}
    assert scores == (folder / "scores.json").read_bytes()
    assert not (folder / "unsent.json").exists(), "the next call evaluates again"


def test_away_while_a_model_is_fetched_nothing_is_kept_and_then_it_is_fetched_once(
    server: Server, saved_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    cache = tmp_path / "cache" / "captioner"
    evaluation = write_evaluation(tmp_path, 0.5, "small", model=saved_model)
    register(RegisterConfig(evaluations=(evaluation,)), MlflowTracking(server.address))
    (weights,) = server.folder.glob("art/**/model.safetensors")
    weights.rename(weights.parent / "moved")
    weights.symlink_to("/proc/self/mem")  # which is listed as a file, and cannot be read
    with pytest.raises(mlflow.exceptions.MlflowException):
        download_model("models:/captioner@champion")
    assert not list(cache.glob("[!.]*")) and not list(cache.glob(".part-*"))

    (weights.parent / "moved").rename(weights)
    fetched = download_model("models:/captioner@champion")
    assert weights_digest(fetched) == weights_digest(str(saved_model))
    assert Path(fetched).is_relative_to(cache)
    assert download_model("models:/captioner/1") == fetched and len(list(cache.glob("[!.]*"))) == 1


def test_a_registry_that_is_away_is_not_taken_for_an_empty_one(
    captioner: Callable, scenes: Path
) -> None:
    """And within seconds: MLflow's client alone would retry for four minutes."""
    address = f"http://127.0.0.1:{free_port()}"
    batch = ("batch", "--images", scenes / "val2017", "--output", "out", "--model")
    commands: list[tuple[object, ...]] = [
        (*batch, "models:/captioner@champion"),
        ("models",),
        ("register", "--evaluations", "gone"),
        ("run", "--scenes", "2"),
    ]
    with ThreadPoolExecutor() as pool:
        processes = pool.map(lambda words: captioner(*words, MLFLOW_TRACKING_URI=address), commands)
    for process in processes:
        *retries, line = process.stderr.splitlines()
        assert process.returncode == 1, process.stderr
        assert line.startswith("captioner: failed: ") and "refused" in line
        assert f"MLflow at {address}: fails" in line
        assert all("next attempt" in retry for retry in retries), process.stderr


def test_a_store_that_is_no_database_is_one_line(captioner: Callable, tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 1000)
    process = captioner("models", MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/mlflow.db")
    assert process.returncode == 1 and "Traceback" not in process.stderr, process.stderr
    line = process.stderr.splitlines()[-1]
    assert line.startswith("captioner: failed: ") and "not a database" in line
