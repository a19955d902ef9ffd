"""MLflow away when training starts, while it goes on, when it ends, when an evaluation is logged or
a model fetched."""

import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import mlflow
import numpy as np
import pytest
from torch import Tensor

from model_lib.errors import WorkError
from model_lib.evaluate.config import EvaluateConfig
from model_lib.evaluate.evaluation import evaluate
from model_lib.model.sources import weights_digest
from model_lib.registry.config import RegisterConfig
from model_lib.registry.model_uris import download_model
from model_lib.registry.registry import register
from model_lib.tracking.mlflow_run import FAIL_FAST
from model_lib.tracking.server import MlflowTracking
from model_lib.train.config import TrainConfig
from model_lib.train.step import TrainStep
from model_lib.train.training import train
from tests.helpers.evaluations import evaluated
from tests.helpers.services import Faults, faulty_proxy, free_port, mlflow_server


class Server:
    """An MLflow server that can be away: out of order behind a proxy, which is quick, or
    stopped."""

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
    """Little patience, so that a test has it as well."""
    monkeypatch.setattr("model_lib.tracking.mlflow_run.INTERVAL", 0.02)
    monkeypatch.setattr("model_lib.tracking.mlflow_run.LONGEST_PAUSE", 0.1)
    monkeypatch.setattr("model_lib.tracking.mlflow_run.AT_START", 0.1)
    monkeypatch.setenv("CAPTIONER_RETRY_SECONDS", "0.1")


def before_step(
    monkeypatch: pytest.MonkeyPatch, actions: dict[int, Callable[[], None]]
) -> list[int]:
    """Do things before some steps; return the list of the steps that are learned."""
    learn, learned = TrainStep.run, list[int]()

    def acting(learner: TrainStep, batch: np.ndarray, pixels: Tensor, step: int) -> dict:
        actions.get(step, lambda: None)()
        learned.append(step)
        return learn(learner, batch, pixels, step)

    monkeypatch.setattr("model_lib.train.step.TrainStep.run", acting)
    return learned


def options(data: Path, output: Path) -> TrainConfig:
    return TrainConfig(
        data=str(data),
        output=str(output),
        preset="tiny",
        epochs=6,
        validate_every=6,
        log_steps=1,
        checkpoint_steps=1,
        name=output.name,
    )


def only_run(tracking: MlflowTracking, name: str) -> mlflow.entities.Run:
    (run,) = tracking.client.search_runs(
        [tracking.experiment_id], f"attributes.run_name = '{name}'"
    )
    return run


def curve(
    tracking: MlflowTracking, run: mlflow.entities.Run, name: str = "train_loss"
) -> list[int]:
    """Return a curve's steps in the order of their times."""
    points = tracking.client.get_metric_history(run.info.run_id, name)
    return [point.step for point in sorted(points, key=lambda point: (point.timestamp, point.step))]


def test_away_at_the_start_is_told_before_any_work(tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(
        WorkError, match=rf"^MLflow at {address}: fails \(.*Connection refused\); see to the server"
    ) as one:
        train(TrainConfig(data="nowhere", output=str(tmp_path / "run")), MlflowTracking(address))
    assert str(one.value).endswith("nothing was done") and not (tmp_path / "run").exists()


def test_a_server_that_takes_calls_and_never_answers_is_told_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAIL_FAST, "MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        address = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        with pytest.raises(WorkError, match=r"timed out.*nothing was done"):
            train(
                TrainConfig(data="nowhere", output=str(tmp_path / "run")), MlflowTracking(address)
            )


def test_away_in_the_middle_training_goes_on_and_all_points_arrive(
    server: Server,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tracking = MlflowTracking(server.address)
    before_step(monkeypatch, {2: server.stop, 10: server.start})
    train(options(data, tmp_path / "middle"), tracking)
    run = only_run(tracking, "middle")
    assert run.info.status == "FINISHED"
    assert curve(tracking, run) == list(range(1, 13)) and curve(tracking, run, "val_loss") == [
        6,
        12,
    ]
    assert caplog.text.count("training goes on, and its points are kept") == 1


def test_away_at_the_end_the_model_is_safe_and_the_same_command_sends_the_points(
    server: Server, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking = MlflowTracking(server.address)
    with monkeypatch.context() as patched:
        before_step(patched, {7: server.away})
        with pytest.raises(
            WorkError, match=r"its model is safe, but \d+ points of run \w{32} were not sent"
        ):
            train(options(data, tmp_path / "end"), tracking)
    best = (tmp_path / "end" / "best" / "model.safetensors").read_bytes()
    server.back()
    learned = before_step(monkeypatch, {})
    trained = train(options(data, tmp_path / "end"), tracking)
    assert not learned and trained.steps == 12
    run = only_run(tracking, "end")
    assert run.info.run_id == trained.run_id and run.info.status == "FINISHED"
    assert curve(tracking, run) == list(range(1, 13)) and curve(tracking, run, "val_loss") == [
        6,
        12,
    ]
    assert best == (tmp_path / "end" / "best" / "model.safetensors").read_bytes()
    ended = run.info.end_time
    train(options(data, tmp_path / "end"), tracking)
    assert only_run(tracking, "end").info.end_time == ended, "there was nothing more to send"


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
    learned = before_step(monkeypatch, {})
    train(options(data, tmp_path / "killed"), tracking)
    assert learned == [9, 10, 11]
    assert curve(tracking, only_run(tracking, "killed")) == list(range(1, 13))


def test_a_server_that_hangs_holds_up_no_step(
    server: Server, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a call hangs, steps are learned: did one wait for it, the call would never end."""
    hanging, go = threading.Event(), threading.Event()
    tracking = MlflowTracking(server.address)
    log_batch = mlflow.MlflowClient.log_batch

    def hang(
        client: mlflow.MlflowClient, run_id: str, metrics: object = (), **others: object
    ) -> None:
        if metrics and not go.is_set():
            hanging.set()
            assert go.wait(60), "steps were held up"
        log_batch(client, run_id, metrics=metrics, **others)

    monkeypatch.setattr("mlflow.MlflowClient.log_batch", hang)

    def hangs() -> None:
        assert hanging.wait(60)

    before_step(monkeypatch, {2: hangs, 11: go.set})
    train(options(data, tmp_path / "hanging"), tracking)
    assert curve(tracking, only_run(tracking, "hanging")) == list(range(1, 13))


def test_away_when_an_evaluation_is_logged_the_same_command_only_sends(
    server: Server, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking = MlflowTracking(server.address)
    model = train(
        TrainConfig(
            data=str(data), output=str(tmp_path / "run"), preset="tiny", epochs=1, name="e"
        ),
        tracking,
    )
    config = EvaluateConfig(model=model.model, data=str(data), output=str(tmp_path / "evaluated"))
    server.away()
    with monkeypatch.context() as patched:
        patched.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        with pytest.raises(
            WorkError,
            match=r"evaluated: is written, but its scores are not in MLflow \(.*503.*\); the same",
        ):
            evaluate(config, tracking)
        files = {file.name: file.read_bytes() for file in (tmp_path / "evaluated").iterdir()}
        assert {"scores.json", "results.json", "report.html", "predictions.parquet"} < files.keys()
        patched.setattr("model_lib.model.captioning.caption_pixels", None)
        with pytest.raises(WorkError, match="is written, but"):
            evaluate(config, tracking)
    server.back()
    with monkeypatch.context() as patched:
        patched.setattr("model_lib.model.captioning.caption_pixels", None)
        evaluation = evaluate(config, tracking)
    found = tracking.client.get_run(model.run_id).data.metrics
    assert evaluation.scores["CIDEr"] in found.values()
    assert json.loads(files["scores.json"]) == json.loads(json.dumps(evaluation.to_dict()))
    assert not (tmp_path / "evaluated" / "unsent.json").exists(), "and the next one evaluates anew"


def test_away_while_a_model_is_fetched_nothing_is_kept_and_then_it_is_fetched_once(
    server: Server, saved_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    cache = tmp_path / "cache" / "captioner"
    evaluated(0.5, "small", model=str(saved_model)).write(str(tmp_path / "evaluated"), "")
    register(
        RegisterConfig(evaluations=(str(tmp_path / "evaluated"),)), MlflowTracking(server.address)
    )
    (weights,) = server.folder.glob("art/**/model.safetensors")
    weights.rename(weights.parent / "moved")
    weights.symlink_to("/proc/self/mem")  # which is listed as a file, and cannot be read
    with pytest.raises(mlflow.exceptions.MlflowException):
        download_model("models:/captioner@champion")
    assert not list(cache.glob("[!.]*")) and not list(cache.glob(".part-*"))

    (weights.parent / "moved").rename(weights)
    fetched = download_model("models:/captioner@champion")
    assert weights_digest(fetched) == weights_digest(str(saved_model)) and Path(
        fetched
    ).is_relative_to(cache)
    assert download_model("models:/captioner/1") == fetched and len(list(cache.glob("[!.]*"))) == 1


def test_a_registry_that_is_away_is_not_taken_for_an_empty_one(
    captioner: Callable, scenes: Path
) -> None:
    """And within seconds: left alone, MLflow's client asks for four minutes."""
    address = f"http://127.0.0.1:{free_port()}"
    given = (
        "--images",
        scenes / "val2017",
        "--output",
        "out",
        "--model",
        "models:/captioner@champion",
    )
    saying = {
        (
            "batch",
            *given,
        ): f"captioner: failed: models:/captioner@champion: MLflow at {address}: fails",
        ("models",): f"captioner: failed: MLflow at {address}: fails",
        ("register", "--evaluations", "gone"): f"captioner: failed: MLflow at {address}: fails",
        ("run", "--scenes", "2"): f"captioner: failed: MLflow at {address}: fails",
    }
    with ThreadPoolExecutor() as both:
        ended = both.map(lambda command: captioner(*command, MLFLOW_TRACKING_URI=address), saying)
    for done, said in zip(ended, saying.values(), strict=True):
        asking, last = done.stderr.splitlines()[:-1], done.stderr.splitlines()[-1]
        assert done.returncode == 1 and last.startswith(said) and "refused" in last, done.stderr
        assert all("asking again" in line for line in asking), done.stderr


def test_a_store_that_is_no_database_is_one_line(captioner: Callable, tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 1000)
    done = captioner("models", MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/mlflow.db")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert (
        done.stderr.splitlines()[-1].startswith("captioner: failed: ")
        and "not a database" in done.stderr
    )
