"""That a training run always reaches its end, and always the same one: killed, stopped, resumed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from torch import Tensor

from model_lib import UserError
from model_lib.data.shards import read_manifest
from model_lib.tracking.server import MlflowTracking, Run, Tracking
from model_lib.train.build import build_model
from model_lib.train.checkpoint import Checkpoints, Position, load, snapshot
from model_lib.train.config import TrainConfig
from model_lib.train.learning import Learner, make_optimizer
from model_lib.train.training import train
from model_lib.train.validation import Validator
from tests.helpers.killed import killed
from tests.model_lib.train.test_training import config, evaluated, kept

RECIPE = {"dropout": 0.3, "ema": 0.9, "augment": "yes", "label_smoothing": 0.1}
"""All that is random or goes on from step to step."""


def same_best(ours: Path, theirs: Path) -> bool:
    return (ours / "best" / "model.safetensors").read_bytes() == (
        theirs / "best" / "model.safetensors"
    ).read_bytes()


def newest_step(folder: Path) -> int:
    newest = Checkpoints(str(folder)).newest()
    assert newest is not None
    return load(newest)[1].step


def stop_at(step: int, patched: pytest.MonkeyPatch) -> None:
    """Let training be interrupted before it takes a step."""
    learn = Learner.learn

    def stop(learner: Learner, batch: np.ndarray, pixels: Tensor, number: int) -> dict:
        if number == step:
            raise KeyboardInterrupt
        return learn(learner, batch, pixels, number)

    patched.setattr("model_lib.train.learning.Learner.learn", stop)


# ---- killed and started again --------------------------------------------------------------------


def curves(database: Path) -> dict[str, dict[int, set[float]]]:
    """Return each metric's values by step, of the only run in an MLflow store."""
    client = mlflow.MlflowClient(f"sqlite:///{database}")
    (run,) = client.search_runs([client.get_experiment_by_name("captioner").experiment_id])
    assert run.info.status == "FINISHED"
    found: dict[str, dict[int, set[float]]] = {}
    for name in run.data.metrics:
        if not name.startswith("system/") and name != "images_per_second":
            for point in client.get_metric_history(run.info.run_id, name):
                found.setdefault(name, {}).setdefault(point.step, set()).add(point.value)
    return found


@pytest.mark.soak
def test_killed_at_random_moments_it_gives_the_same_curves_and_model_bit_for_bit(
    data: Path, tmp_path: Path
) -> None:
    options = {
        "data": str(data),
        "preset": "tiny",
        "epochs": 3,
        "batch_size": 8,
        "validate_every": 5,
        **RECIPE,
    }
    options |= {"checkpoint_steps": 1, "log_steps": 1}
    kills = killed("train", options, str(tmp_path), seed=0, kills=2)
    assert sum(map(len, kills)) == 2
    theirs = curves(tmp_path / "whole-store" / "mlflow.db")
    assert set(theirs["train_loss"]) == set(range(1, 25))
    for number in range(len(kills)):
        ours = curves(tmp_path / f"killed-{number}-store" / "mlflow.db")
        assert ours == theirs and all(
            len(values) == 1 for metric in ours.values() for values in metric.values()
        )
        assert same_best(tmp_path / f"killed-{number}", tmp_path / "whole")
        assert not list((tmp_path / f"killed-{number}").rglob(".part-*"))


def test_sigterm_saves_and_exits_with_143_and_the_run_goes_on(
    finished: Path, data: Path, tmp_path: Path
) -> None:
    options = ["--data", data, "--output", tmp_path / "run", "--preset", "tiny", "--epochs", "3"]
    command = [
        sys.executable,
        "-m",
        "model_lib",
        "train",
        *map(str, options),
        "--checkpoint_steps",
        "1",
    ]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=log, stdout=log)
        deadline = time.monotonic() + 120
        while (
            not list(tmp_path.glob("run/checkpoints/*/manifest.json"))
            and time.monotonic() < deadline
        ):
            time.sleep(0.005)
        run.send_signal(signal.SIGTERM)
        assert run.wait(60) == 143
    said = (tmp_path / "log").read_text()
    assert (
        "Traceback" not in said
        and f"stopped by SIGTERM after step {newest_step(tmp_path / 'run')}" in said
    )
    assert newest_step(tmp_path / "run") < 6, "the run was over before it could be stopped"
    client = mlflow.MlflowClient(environment["MLFLOW_TRACKING_URI"])
    (stopped,) = client.search_runs(["1"])
    assert stopped.info.status == "KILLED"
    train(
        config(data, tmp_path / "run", epochs=3), MlflowTracking(environment["MLFLOW_TRACKING_URI"])
    )
    assert same_best(tmp_path / "run", finished)
    assert (
        client.get_run(stopped.info.run_id).info.status == "FINISHED"
        and len(client.search_runs(["1"])) == 1
    )


def test_stopped_in_a_validation_it_keeps_the_weights_and_not_their_average(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config(data, tmp_path / "whole", **RECIPE))
    with monkeypatch.context() as patched:
        measure = Validator.measure

        def asked_meanwhile(*arguments: object) -> dict[str, float]:
            os.kill(os.getpid(), signal.SIGTERM)
            return measure(*arguments)

        patched.setattr("model_lib.train.validation.Validator.measure", asked_meanwhile)
        with pytest.raises(SystemExit) as stop:
            train(config(data, tmp_path / "stopped", **RECIPE))
    assert stop.value.code == 143 and newest_step(tmp_path / "stopped") == 2
    train(config(data, tmp_path / "stopped", **RECIPE))
    assert same_best(tmp_path / "stopped", tmp_path / "whole")


def test_killed_in_the_validation_it_ends_the_same(
    finished: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        measure = "model_lib.train.validation.Validator.measure"
        patched.setattr(measure, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(config(data, tmp_path, epochs=3, checkpoint_steps=1))
    assert newest_step(tmp_path) == 2
    train(config(data, tmp_path, epochs=3))
    assert same_best(tmp_path, finished)


@pytest.mark.parametrize("objective", ["cross-entropy", "self-critical"])
def test_resumed_with_every_option_it_ends_the_same(
    finished: Path, data: Path, tmp_path: Path, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict = dict(RECIPE)
    if objective == "self-critical":
        options |= {
            "objective": objective,
            "init_from": str(finished / "best"),
            "label_smoothing": None,
        }
    train(config(data, tmp_path / "whole", **options))
    with monkeypatch.context() as patched:
        stop_at(3, patched)
        with pytest.raises(KeyboardInterrupt):
            train(config(data, tmp_path / "cut", checkpoint_steps=1, **options))
    assert newest_step(tmp_path / "cut") == 3
    train(config(data, tmp_path / "cut", **options))
    assert same_best(tmp_path / "cut", tmp_path / "whole") and not same_best(
        finished, tmp_path / "whole"
    )


def test_early_stopping_counts_on_after_a_kill(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"epochs": 4, "validate_every": 1, "patience": 3}
    with monkeypatch.context() as patched:
        evaluated(patched, (3.0, 0.5), (2.0, 0.2), (2.0, 0.2))
        with pytest.raises(StopIteration):
            train(config(data, tmp_path, **options))
    evaluated(monkeypatch, (2.0, 0.2), (2.0, 0.9))
    assert train(config(data, tmp_path, **options)).steps == 4
    assert kept(tmp_path) == 1


@pytest.mark.gpu
def test_resuming_on_a_gpu_goes_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    for kind in ("bfloat16", "float16"):
        options = {"device": "cuda", "precision": kind, "checkpoint_steps": 1}
        with monkeypatch.context() as patched:
            stop_at(3, patched)
            with pytest.raises(KeyboardInterrupt):
                train(config(data, tmp_path / kind, **options))
        assert train(config(data, tmp_path / kind, **options)).steps == 4


# ---- checkpoints ---------------------------------------------------------------------------------


def test_the_last_ones_are_kept_and_what_a_kill_left_half_written_is_not(
    data: Path, tmp_path: Path
) -> None:
    half = tmp_path / "checkpoints" / "step-00000001"
    half.mkdir(parents=True)
    (half / "state.json").write_text("{}")
    (half / ".part-abc").write_text("")
    train(config(data, tmp_path, epochs=3, checkpoint_steps=1, checkpoints_kept=3))
    names = sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000005", "step-00000006", "step-00000006-validated"]


def test_half_written_checkpoints_never_push_out_whole_ones(
    finished: Path, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints")
    for step in (7, 8, 9):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir()
        (tmp_path / "checkpoints" / f"step-{step:08d}" / "state.json").write_text("{}")
    checkpoints = Checkpoints(str(tmp_path))
    newest = checkpoints.newest()
    assert newest is not None and newest.endswith("step-00000006-validated")
    model = build_model(config(data, tmp_path), read_manifest(str(data)))
    tensors = snapshot(model, make_optimizer(model, config(data, tmp_path)), {})
    checkpoints.write("step-00000005", tensors, Position(5, 0, 0, None, "", {}, [], {}))
    names = sorted(file.name for file in (tmp_path / "checkpoints").iterdir())
    assert names[0] == "step-00000005" and checkpoints.newest() == newest


def test_a_damaged_checkpoint_is_passed_over(finished: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    file = newest / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-7] + b"damaged")
    assert Checkpoints(str(tmp_path / "run")).newest() != str(newest)
    train(config(data, tmp_path / "run", epochs=3))
    assert same_best(tmp_path / "run", finished)


def test_training_goes_on_while_a_checkpoint_is_written(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first checkpoint's writing waits for a later step: were it not for the thread, they would
    wait for ever."""
    learned, write = [], Checkpoints.write
    learn = Learner.learn

    def note(learner: Learner, *batch: object) -> dict:
        learned.append(batch)
        return learn(learner, *batch)

    def wait(checkpoints: Checkpoints, *content: object) -> None:
        deadline = time.monotonic() + 60
        while len(learned) < 4:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        write(checkpoints, *content)

    monkeypatch.setattr("model_lib.train.learning.Learner.learn", note)
    monkeypatch.setattr("model_lib.train.checkpoint.Checkpoints.write", wait)
    assert train(config(data, tmp_path, epochs=1, batch_size=8, checkpoint_minutes=0)).steps == 8


# ---- which run is which --------------------------------------------------------------------------


def test_a_start_that_was_killed_before_its_first_checkpoint_is_one_run_in_mlflow(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[str] = []

    class Keys(Tracking):
        def start(self, name: str, key: str | None, *_: object, **__: object) -> Run:
            keys.append(str(key))
            return Run()

    with monkeypatch.context() as patched:
        stop_at(0, patched)
        with pytest.raises(KeyboardInterrupt):
            train(config(data, tmp_path), Keys())
    with pytest.raises(UserError, match="holds a run with other options"):
        train(config(data, tmp_path, learning_rate=0.5), Keys())
    train(config(data, tmp_path), Keys())
    assert keys[0] == keys[1] and len(keys) == 2


def test_the_options_that_shape_nothing_do_not_change_the_run() -> None:
    plain = TrainConfig(data="d", output="o")
    others = {
        "checkpoint_steps": 5,
        "checkpoints_kept": 4,
        "log_steps": 3,
        "processes": 2,
        "checkpoint_minutes": 1.0,
    }
    assert TrainConfig(data="d", output="o", **others).key() == plain.key()
