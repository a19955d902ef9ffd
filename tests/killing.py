"""Kills a training run again and again, and lets it start again until it ends by itself.

    python -m tests.killing '{"data": …}' FOLDER SEED KILLS

trains the configuration once undisturbed in FOLDER/whole, then in FOLDER/killed with SIGKILL at random moments, every
other one of them while files are half-written. Each process is forked from this one, which has imported everything and
computed nothing: a kill then costs no start of Python. It prints one line of JSON: each kill, and where it fell.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import mlflow  # noqa: F401  (before the forks)

from model_lib.checkpoint import Checkpoints
from model_lib.config import TrainConfig
from model_lib.tracking import tracking_from_environment
from model_lib.training import train


def start(options: dict, output: Path) -> int:
    """Begin or go on with a run in a process of its own; return the process."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{output}.db"
        train(TrainConfig(**{**options, "output": str(output)}), tracking_from_environment())
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(process: int) -> bool:
    done, status = os.waitpid(process, os.WNOHANG)
    assert status == 0, "training failed by itself"
    return done == process


def half_written(output: Path) -> set[Path]:
    """Return the files that are half-written, and the checkpoints without a manifest."""
    folders = {file.parent for file in output.glob("checkpoints/*/state*")}
    return {*output.rglob(".part-*"), *(folder for folder in folders if not (folder / "manifest.json").exists())}


def step_of(output: Path) -> int | None:
    newest = Checkpoints(str(output)).newest()
    return None if newest is None else json.loads(Path(newest, "state.json").read_text())["step"]


def main() -> None:
    options, folder, seed, kills = json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    rng, output = random.Random(seed), folder / "killed"
    began, process = time.monotonic(), start(options, folder / "whole")
    while not ended(process):
        time.sleep(0.05)
    whole = time.monotonic() - began
    fell: list[dict] = []
    while len(fell) < kills:
        left = half_written(output)
        process = start(options, output)
        at, in_a_save = time.monotonic() + rng.uniform(0, 0.3 * whole), len(fell) % 2 == 1
        while not (over := ended(process)):
            if time.monotonic() > at and (not in_a_save or half_written(output) - left):
                break
            time.sleep(0.0005)
        if over:
            break
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        fell.append({"in_a_save": bool(half_written(output) - left), "checkpoint": step_of(output)})
    else:
        process = start(options, output)
        while not ended(process):
            time.sleep(0.05)
    print(json.dumps({"kills": fell, "undisturbed_seconds": round(whole, 1)}))


if __name__ == "__main__":
    main()
