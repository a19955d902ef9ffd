"""Kills a stage again and again at random moments, and lets it resume until it ends by itself.

    python -m tests.helpers.killing STAGE OPTIONS FOLDER SEED KILLS

runs the stage with its options (JSON) once undisturbed, its output in FOLDER/whole, then in
FOLDER/killed-0, -1, … each killed a few times and then left to its end, until there were so many
kills. Every other kill waits for a moment in which files are half-written. Each process is forked
from this one, which has imported everything and computed nothing: a kill then costs no start of
Python. It prints one line of JSON: where each kill fell, a list a round.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import mlflow.pyfunc  # noqa: F401  (before the forks)
import torch

from model_lib.batch.batching import batch
from model_lib.batch.config import BatchConfig
from model_lib.evaluate.config import EvaluateConfig
from model_lib.evaluate.evaluation import evaluate
from model_lib.ingest.config import IngestConfig
from model_lib.ingest.ingesting import ingest
from model_lib.io import storage
from model_lib.registry.config import RegisterConfig
from model_lib.registry.registry import register
from model_lib.tracking.server import MlflowTracking, require_mlflow, tracking_from_environment
from model_lib.train.config import TrainConfig
from model_lib.train.training import train
from tests.helpers.services import empty_store

MOST = 6
"""Kills a round."""


def _tracking(output: str) -> MlflowTracking:
    """Return the tracking in the output's own store."""
    folder = Path(f"{output}-store")
    store = f"sqlite:///{folder}/mlflow.db" if folder.exists() else empty_store(folder)
    os.environ["MLFLOW_TRACKING_URI"] = store
    return require_mlflow(tracking_from_environment())


def run(stage: str, options: dict, output: str) -> None:
    if stage == "ingest":
        ingest(IngestConfig(**options, output=output))
    elif stage == "train":
        train(TrainConfig(**options, output=output), _tracking(output))
    elif stage == "evaluate":
        evaluate(EvaluateConfig.from_options(**options, output=output), _tracking(output))
    elif stage == "batch":
        batch(BatchConfig.from_options(**options, output=output))
    elif stage == "register":  # a copy of the evaluations
        if not Path(output).exists():
            shutil.copytree(options["evaluations"], output)
        register(RegisterConfig(evaluations=(output,)), _tracking(output))


def start(stage: str, options: dict, output: str) -> int:
    """Start or resume a stage in a process of its own; return the process."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        torch.set_num_threads(1)
        run(stage, options, output)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def has_ended(process: int, stage: str) -> bool:
    done, status = os.waitpid(process, os.WNOHANG)
    assert status == 0, f"{stage} failed by itself"
    return done == process


def run_undisturbed(stage: str, options: dict, output: str) -> float:
    """Let a stage end by itself; return the seconds that it took."""
    began = time.monotonic()
    process = start(stage, options, output)
    while not has_ended(process, stage):
        time.sleep(0.01)
    return time.monotonic() - began


def half_written(output: str) -> set[Path]:
    """Return the local files that are half-written, and the checkpoints without a manifest."""
    if not storage.is_local(output):
        return set()
    folders = {file.parent for file in Path(output).glob("checkpoints/*/state*")}
    whole = {folder for folder in folders if (folder / "manifest.json").exists()}
    return {*Path(output).rglob(".part-*"), *(folders - whole)}


def kill_once(stage: str, options: dict, output: str, delay: float, in_a_save: bool) -> bool | None:
    """Start a stage and kill it after `delay` seconds, or later, when files are half-written.

    Returns:
        Whether files were half-written; None if the stage ended before.
    """
    before = half_written(output)
    process = start(stage, options, output)
    earliest = time.monotonic() + delay
    while not has_ended(process, stage):
        if time.monotonic() > earliest and (not in_a_save or half_written(output) - before):
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return bool(half_written(output) - before)
        time.sleep(0.0005)
    return None


def main() -> None:
    stage, options, folder = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
    seed, kills = map(int, sys.argv[4:])
    rng = random.Random(seed)
    seconds = run_undisturbed(stage, options, f"{folder}/whole")
    rounds: list[list[bool]] = []
    while (left := kills - sum(map(len, rounds))) > 0:
        output = f"{folder}/killed-{len(rounds)}"
        in_saves: list[bool] = []
        for _ in range(min(rng.randint(1, MOST), left)):
            delay, in_a_save = rng.uniform(0, seconds), rng.random() < 0.5
            was_in_save = kill_once(stage, options, output, delay, in_a_save)
            if was_in_save is None:
                break
            in_saves.append(was_in_save)
        run_undisturbed(stage, options, output)
        rounds.append(in_saves)
    print(json.dumps({"kills": rounds, "undisturbed_seconds": round(seconds, 1)}))


if __name__ == "__main__":
    main()
