"""Training in several processes: the same curves as in one, each image once, and every end of a
process noticed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from model_lib.io.cpus import cpu_count
from model_lib.tracking.server import MlflowTracking
from model_lib.train.distributed import World
from model_lib.train.training import train
from tests.helpers.training import curves, newest_step, same_best
from tests.helpers.training import train_config as config
from tests.helpers.warm_python import warm_python

OPTIONS = {
    "epochs": 3,
    "batch_size": 9,
    "validate_every": 5,
    "log_steps": 1,
    "ema": 0.9,
    "checkpoint_steps": 1,
}
"""64 images make seven batches of nine and one of a single image, in which a process has none."""


def command(data: Path, output: Path, *more: str) -> list[str]:
    options = [f"--{name}={value}" for name, value in OPTIONS.items()]
    return ["train", f"--data={data}", f"--output={output}", "--preset=tiny", *options, *more]


def environment(output: Path) -> dict[str, str]:
    return {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{output}.db"}


def log_of(output: Path) -> str:
    return output.with_suffix(".log").read_text()


def start(arguments: list[str], output: Path, launcher: Sequence[str] = ()) -> subprocess.Popen:
    program = [sys.executable, *launcher, "-m", "model_lib", *arguments]
    with output.with_suffix(".log").open("a") as log:
        return subprocess.Popen(
            program, env=environment(output), cwd=output.parent, stdout=log, stderr=log
        )


def wait_for_checkpoint(step: int, output: Path, run: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not list(output.glob(f"checkpoints/step-{step:08d}*/manifest.json")):
        assert run.poll() is None and time.monotonic() < deadline, log_of(output)
        time.sleep(0.01)


def children(process: int) -> list[int]:
    lists = [file.read_text().split() for file in Path(f"/proc/{process}/task").glob("*/children")]
    return sorted(int(child) for line in lists for child in line)


def workers(run: subprocess.Popen) -> list[int]:
    """Return the processes that train, in the order of their start: they are forked from a server's
    process."""
    for child in children(run.pid):
        if "forkserver" in Path(f"/proc/{child}/cmdline").read_text():
            return children(child)
    raise AssertionError("there is no server")


@pytest.fixture(scope="module")
def two(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that nothing disturbed."""
    output = tmp_path_factory.mktemp("two") / "run"
    words = [warm_python(), "-m", "model_lib", *command(data, output, "--processes=2")]
    done = subprocess.run(
        words, env=environment(output), cwd=output.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    output.with_suffix(".log").write_text(done.stderr)
    return output


def test_two_processes_give_the_curves_and_weights_of_one(
    data: Path, two: Path, tmp_path: Path
) -> None:
    one = tmp_path / "one"
    train(config(data, one, **OPTIONS), MlflowTracking(f"sqlite:///{one}.db"))
    ours, theirs = curves(two.with_suffix(".db")), curves(one.with_suffix(".db"))
    assert set(ours) == set(theirs) and len(theirs["train_loss"]) == 24
    for name, points in theirs.items():
        assert ours[name].keys() == points.keys(), name
        for step, values in points.items():
            assert [*ours[name][step]] == pytest.approx([*values], rel=1e-4, abs=1e-6), name
    weights = load_file(two / "best" / "model.safetensors")
    for name, weight in load_file(one / "best" / "model.safetensors").items():
        assert torch.allclose(weight, weights[name], atol=1e-3), name


def test_progress_and_validations_are_shown_once(two: Path) -> None:
    stderr = log_of(two)
    assert stderr.count("train candidate: 24/24 steps") == 1
    assert stderr.count("validate candidate: 14/14") == 5, "7 of 12 a split"
    assert "Traceback" not in stderr and "Warning" not in stderr


@pytest.mark.soak
def test_killed_and_stopped_and_taken_over_by_torchrun_it_ends_the_same(
    data: Path, two: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    run = start(command(data, output, "--processes=2"), output)
    wait_for_checkpoint(3, output, run)
    os.kill(workers(run)[1], signal.SIGKILL)
    assert run.wait(60) == 1
    stderr = log_of(output)
    assert "one of 2 processes was ended by SIGKILL" in stderr and "Traceback" not in stderr
    run = start(command(data, output, "--processes=2"), output)
    wait_for_checkpoint(newest_step(output) + 2, output, run)
    run.send_signal(signal.SIGTERM)
    assert run.wait(60) == 143
    assert f"stopped by SIGTERM after step {newest_step(output)}" in log_of(output)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run = start(command(data, output), output, launcher)
    assert run.wait(120) == 0, log_of(output)
    assert curves(output.with_suffix(".db")) == curves(two.with_suffix(".db"))
    assert same_best(output, two)


@pytest.mark.soak
def test_a_mistake_is_told_once_and_in_one_line(captioner: Callable[..., CompletedProcess]) -> None:
    done = captioner("train", "--data=nothing", "--output=out", "--preset=tiny", "--processes=2")
    (stderr,) = done.stderr.splitlines()
    assert done.returncode == 2 and stderr.startswith("captioner: error: nothing: no such data set")


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("images", [1, 2, 7, 64])
def test_each_image_of_a_batch_is_learned_once(size: int, images: int) -> None:
    batch = np.arange(images)
    worlds = [World(torch.device("cpu"), rank, size) for rank in range(size)]
    shares = [world.shard(batch) for world in worlds if not world.has_no_rows(batch)]
    assert sorted(np.concatenate(shares)) == batch.tolist()
    assert all(len(world.shard(batch)) for world in worlds), "each takes part in each step"
    measured = [number for world in worlds for number in world.share(batch.tolist())]
    assert sorted(measured) == batch.tolist()


def test_processes_of_a_machine_share_its_cores() -> None:
    worlds = [World(torch.device("cpu"), rank, 8, rank % 4, local_size=4) for rank in range(8)]
    assert sum(world.threads(0) for world in worlds[:4]) <= max(4, cpu_count())
    assert worlds[0].threads(0) == max(1, cpu_count() // 4) and worlds[0].threads(3) == 3
