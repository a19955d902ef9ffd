"""Two runs in one output folder at the same time: the second is refused in one line, and a kill
leaves no lock."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from model_lib.batch.batching import batch
from model_lib.batch.planning import output_folder, resolve
from model_lib.errors import WorkError
from model_lib.evaluate.config import EvaluateConfig
from model_lib.evaluate.evaluation import evaluate
from model_lib.io.locks import output_lock
from model_lib.train.training import train
from tests.helpers.batches import batch_config
from tests.helpers.ingests import ingested
from tests.helpers.training import train_config

LOCK = """
import sys, time
from model_lib.io.locks import output_lock
with output_lock(sys.argv[1]):
    print("locked", flush=True)
    time.sleep(600)
"""


@contextmanager
def another(folder: Path | str) -> Iterator[subprocess.Popen]:
    """Let another process lock a folder."""
    with subprocess.Popen(
        [sys.executable, "-c", LOCK, str(folder)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "locked\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("stage", ["ingest", "train", "evaluate", "batch"])
def test_the_second_is_refused_and_after_a_kill_of_the_first_it_runs(
    stage: str, scenes: Path, data: Path, finished: Path, saved_model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    batching = batch_config(scenes / "val2017", output, saved_model)
    evaluating = {"model": str(finished / "best"), "data": str(data), "output": str(output)}
    folder = output_folder(resolve(batching)) if stage == "batch" else str(output)
    run: dict[str, Callable[[], object]] = {
        "ingest": lambda: ingested(output, dataset=scenes),
        "train": lambda: train(train_config(data, output, epochs=1)),
        "evaluate": lambda: evaluate(EvaluateConfig(**evaluating)),
        "batch": lambda: batch(batching),
    }
    with another(folder) as first:
        part = Path(folder, ".part-abc")
        part.write_text("")
        with pytest.raises(WorkError, match=f"{folder}: another run is at work there; wait for it"):
            run[stage]()
        assert part.exists(), "the first may be writing it"
        first.kill()
        first.wait()
        run[stage]()
    assert not part.exists()


def test_a_lock_ends_with_its_run_also_after_a_failure(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(KeyError), output_lock(str(tmp_path)):
            raise KeyError
    with output_lock(str(tmp_path)), output_lock(str(tmp_path / "other")):
        pass


def test_other_runs_half_written_files_below_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".part-store").mkdir()
    for file in (".part-a", "deeper/.part-b", "another/.part-c"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("")
    with another(tmp_path / "another"):
        (tmp_path / "another" / ".part-d").write_text("")
        with output_lock(str(tmp_path)):
            left = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob(".part-*")}
    assert left == {".part-store", "another/.part-d"}
