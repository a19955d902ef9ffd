"""Two runs in one output folder at the same time: the second is refused in one line, and a kill leaves no lock."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from model_lib import UserError, storage
from model_lib.batch import folder_of, resolved
from model_lib.config import BatchConfig, EvaluateConfig, IngestConfig, TrainConfig
from model_lib.evaluation import evaluate
from model_lib.ingest import ingest
from model_lib.merging import batch
from model_lib.training import train

HOLDS = """
import sys, time
from model_lib import storage
with storage.held(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def another(folder: Path | str) -> Iterator[subprocess.Popen]:
    """Let another process be at work in a folder."""
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("stage", ["ingest", "train", "evaluate", "batch"])
def test_the_second_is_refused_and_after_a_kill_of_the_first_it_runs(
    stage: str, scenes: Path, data: Path, finished: Path, saved_model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    batching = BatchConfig(images=str(scenes / "val2017"), output=str(output), model=str(saved_model))
    held = folder_of(resolved(batching)) if stage == "batch" else str(output)
    run: dict[str, Callable[[], object]] = {
        "ingest": lambda: ingest(IngestConfig(dataset=str(scenes), output=str(output))),
        "train": lambda: train(TrainConfig(data=str(data), output=str(output), preset="tiny", epochs=1)),
        "evaluate": lambda: evaluate(EvaluateConfig(model=str(finished / "best"), data=str(data), output=str(output))),
        "batch": lambda: batch(batching),
    }
    with another(held) as first:
        half = Path(held, ".part-abc")
        half.write_text("")
        said = f"{held}: process {first.pid} on {socket.gethostname()} is at work there; wait for it, or choose"
        with pytest.raises(UserError, match=said):
            run[stage]()
        assert half.exists(), "what the first is writing is left alone"
        first.send_signal(signal.SIGKILL)
        first.wait()
        run[stage]()
    assert not half.exists()


def test_a_folder_that_was_held_is_free_again_also_after_a_failure(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(KeyError), storage.held(str(tmp_path)):
            raise KeyError
    with storage.held(str(tmp_path)), storage.held(str(tmp_path / "other")):
        pass
    assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
