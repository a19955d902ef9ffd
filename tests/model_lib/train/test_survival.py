"""A training run that is killed, stopped or resumed reaches the same end."""

import os
import shutil
import signal
import subprocess
import threading
import time
import uuid
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
import torch

from model_lib import UserError
from model_lib.errors import WorkError
from model_lib.tracking.server import MlflowTracking
from model_lib.train.checkpoint import Checkpoints, Position
from model_lib.train.config import TrainConfig
from model_lib.train.step import TrainStep
from model_lib.train.training import train
from model_lib.train.validation import Validator
from tests.helpers.killed import killed
from tests.helpers.training import (
    RECIPE,
    Curve,
    before_steps,
    best_step,
    curves,
    interrupt_at,
    newest_step,
    same_best,
    set_validation_scores,
)
from tests.helpers.training import train_config as config
from tests.helpers.warm_python import warm_python

NOWHERE = Position(0, 0, 0, None, 0, {}, {})

# ---- killed and started again --------------------------------------------------------------------


@pytest.mark.soak
def test_killed_at_random_moments_it_gives_the_same_curves_and_model_bit_for_bit(
    data: Path, tmp_path: Path
) -> None:
    options = {"data": str(data), "preset": "tiny", "epochs": 3, "batch_size": 8, **RECIPE}
    options |= {"validate_every": 5, "checkpoint_steps": 1, "log_steps": 1}
    kills = killed("train", options, str(tmp_path), seed=0, kills=2)
    assert sum(map(len, kills)) == 2
    theirs = curves(tmp_path / "whole-store" / "mlflow.db")
    assert set(theirs["train_loss"]) == set(range(1, 25))
    for number in range(len(kills)):
        ours = curves(tmp_path / f"killed-{number}-store" / "mlflow.db")
        assert ours == theirs
        assert all(len(values) == 1 for metric in ours.values() for values in metric.values())
        assert same_best(tmp_path / f"killed-{number}", tmp_path / "whole")
        assert not list((tmp_path / f"killed-{number}").rglob(".part-*"))


def test_sigterm_saves_and_exits_with_143_and_the_run_goes_on(
    finished: Path, data: Path, tmp_path: Path
) -> None:
    output, store = tmp_path / "run", f"sqlite:///{tmp_path}/mlflow.db"
    command = [warm_python(), "-m", "model_lib", "train", f"--data={data}", f"--output={output}"]
    command += ["--preset=tiny", "--epochs=3", "--checkpoint_steps=1"]
    with (tmp_path / "log").open("w") as log:
        environment = {**os.environ, "MLFLOW_TRACKING_URI": store}
        run = subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=log, stdout=log)
        deadline = time.monotonic() + 120
        while not list(output.glob("checkpoints/*/manifest.json")) and time.monotonic() < deadline:
            time.sleep(0.005)
        run.send_signal(signal.SIGTERM)
        assert run.wait(60) == 143
    log_text = (tmp_path / "log").read_text()
    assert "Traceback" not in log_text
    assert f"stopped by SIGTERM after step {newest_step(output)}" in log_text
    assert newest_step(output) < 6, "the run was over before it could be stopped"
    client = mlflow.MlflowClient(store)
    (stopped,) = client.search_runs(["1"])
    assert stopped.info.status == "KILLED"
    train(config(data, output, epochs=3), MlflowTracking(store))
    assert same_best(output, finished)
    (ended,) = client.search_runs(["1"])
    assert (ended.info.run_id, ended.info.status) == (stopped.info.run_id, "FINISHED")


def test_stopped_in_a_validation_it_keeps_the_weights_and_not_their_average(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config(data, tmp_path / "whole", **RECIPE))
    with monkeypatch.context() as patched:
        measure = Validator.measure

        def measure_after_signal(*arguments: object) -> dict[str, float]:
            os.kill(os.getpid(), signal.SIGTERM)
            return measure(*arguments)

        patched.setattr(Validator, "measure", measure_after_signal)
        with pytest.raises(SystemExit) as stop:
            train(config(data, tmp_path / "stopped", **RECIPE))
    assert stop.value.code == 143 and newest_step(tmp_path / "stopped") == 2
    train(config(data, tmp_path / "stopped", **RECIPE))
    assert same_best(tmp_path / "stopped", tmp_path / "whole")


def test_killed_in_the_validation_it_ends_the_same(
    finished: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched, pytest.raises(StopIteration):
        set_validation_scores(patched)  # none
        train(config(data, tmp_path, epochs=3, checkpoint_steps=1))
    assert newest_step(tmp_path) == 2
    train(config(data, tmp_path, epochs=3, workers=1))
    assert same_best(tmp_path, finished)


@pytest.mark.parametrize("objective", ["cross-entropy", "self-critical"])
def test_resumed_with_every_option_it_ends_the_same(
    finished: Path, data: Path, tmp_path: Path, objective: str
) -> None:
    options: dict = dict(RECIPE)
    if objective == "self-critical":
        options |= {"objective": objective, "init_from": str(finished / "best")}
        options |= {"label_smoothing": None}
    train(config(data, tmp_path / "whole", **options))
    interrupt_at(3, config(data, tmp_path / "cut", checkpoint_steps=1, **options))
    assert newest_step(tmp_path / "cut") == 3
    train(config(data, tmp_path / "cut", **options))
    assert same_best(tmp_path / "cut", tmp_path / "whole")


def test_early_stopping_counts_on_after_a_kill(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = config(data, tmp_path, epochs=4, validate_every=1, patience=3)
    with monkeypatch.context() as patched, pytest.raises(StopIteration):
        set_validation_scores(patched, (3.0, 0.5), (2.0, 0.2), (2.0, 0.2))
        train(options)
    set_validation_scores(monkeypatch, (2.0, 0.2), (2.0, 0.9))
    assert train(options).steps == 4
    assert train(options).steps == 4, "it stays finished"
    assert best_step(tmp_path) == 1


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


def test_half_written_checkpoints_never_push_out_whole_ones(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints")
    for step in (7, 8, 9):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir()
        (tmp_path / "checkpoints" / f"step-{step:08d}" / "state.json").write_text("{}")
    checkpoints = Checkpoints(str(tmp_path))
    newest = checkpoints.newest()
    assert newest is not None and newest.endswith("step-00000006-validated")
    checkpoints.write("step-00000005", {"model.w": torch.zeros(3)}, NOWHERE)
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
    later_step, write = threading.Event(), Checkpoints.write

    def write_after_later_step(checkpoints: Checkpoints, *content: object) -> None:
        assert later_step.wait(60)
        write(checkpoints, *content)

    before_steps(monkeypatch, lambda _, step: step == 4 and later_step.set())
    monkeypatch.setattr(Checkpoints, "write", write_after_later_step)
    assert train(config(data, tmp_path, epochs=1, batch_size=8, checkpoint_minutes=0)).steps == 8


def test_of_two_runs_in_a_bucket_the_one_that_is_behind_stops() -> None:
    """A bucket has no locks; a pod that was taken for lost may still be at work."""
    output = f"memory://{uuid.uuid4().hex}"
    ahead, behind = Checkpoints(output), Checkpoints(output)
    tensors = {"model.w": torch.zeros(3)}
    ahead.write("step-00000002", tensors, NOWHERE)
    assert behind.newest() == ahead.newest()
    ahead.write("step-00000005", tensors, NOWHERE)
    message = rf"{output}/checkpoints/step-00000005: another run .* an output of its own"
    with pytest.raises(WorkError, match=message):
        behind.write("step-00000003", tensors, NOWHERE)
    ahead.write("step-00000005-validated", tensors, NOWHERE)
    again = Checkpoints(output)
    assert str(again.newest()).endswith("step-00000005-validated")
    again.write("step-00000006", tensors, NOWHERE)


def test_training_in_a_bucket_stops_at_its_next_checkpoint_when_another_run_is_ahead(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = f"memory://{uuid.uuid4().hex}"

    def overtake(_: TrainStep, step: int) -> None:
        if step == 1:
            Checkpoints(output).write("step-00000004", {"model.w": torch.zeros(3)}, NOWHERE)

    before_steps(monkeypatch, overtake)
    options = config(data, Path("-"), epochs=3)
    with pytest.raises(WorkError, match=r"step-00000004: another run wrote this checkpoint"):
        train(replace(options, output=output))


# ---- which run is which --------------------------------------------------------------------------


def test_a_start_that_was_killed_before_its_first_checkpoint_is_one_run_in_mlflow(
    data: Path, tmp_path: Path
) -> None:
    first, second = Curve(), Curve()
    interrupt_at(0, config(data, tmp_path), first)
    with pytest.raises(UserError, match=r"learning_rate 0.002, not 0.5; choose another output$"):
        train(config(data, tmp_path, learning_rate=0.5))
    train(config(data, tmp_path), second)
    assert first.key == second.key != ""


def test_points_are_logged_again_from_the_step_that_a_run_resumes_at(
    data: Path, tmp_path: Path
) -> None:
    interrupt_at(3, config(data, tmp_path, log_steps=1))
    curve = Curve()
    train(config(data, tmp_path, log_steps=1), curve)
    assert curve.step == 2 and len(curve.points["train_loss"]) == 2


def test_the_options_that_shape_nothing_do_not_change_the_run() -> None:
    plain = TrainConfig(data="d", output="o")
    others = {"checkpoint_steps": 5, "checkpoints_kept": 4, "checkpoint_minutes": 1.0}
    assert replace(plain, log_steps=3, processes=2, **others).key() == plain.key()
