"""Two runs in one output folder at the same time: the second is refused in one line, and a kill
leaves no lock.

In a bucket too, where a file is the lock, and one that its run does not change any more is none.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pytest

from model_lib.batch.batching import batch
from model_lib.batch.config import BatchConfig
from model_lib.batch.planning import folder_of, resolved
from model_lib.errors import WorkError
from model_lib.evaluate.config import EvaluateConfig
from model_lib.evaluate.evaluation import evaluate
from model_lib.ingest.config import IngestConfig
from model_lib.ingest.ingesting import ingest
from model_lib.io import locks, storage
from model_lib.io.locks import output_lock
from model_lib.train.config import TrainConfig
from model_lib.train.training import train
from tests.helpers.services import gcs_emulator

HOLDS = """
import sys, time
from model_lib.io.locks import output_lock
with output_lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""

BOTH = """
import sys, threading
from model_lib.errors import WorkError
from model_lib.io.locks import output_lock
done = threading.Barrier(2, timeout=120)

def run():
    try:
        with output_lock(sys.argv[1]):
            done.wait()
            print("held")
    except WorkError:
        print("refused")
        done.wait()

for thread in [threading.Thread(target=run) for _ in range(2)]:
    thread.start()
"""


@contextmanager
def another(folder: Path | str) -> Iterator[subprocess.Popen]:
    """Let another process be at work in a folder."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(folder)], stdout=subprocess.PIPE, text=True
    ) as process:
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
    batching = BatchConfig(
        images=str(scenes / "val2017"), output=str(output), model=str(saved_model)
    )
    held = folder_of(resolved(batching)) if stage == "batch" else str(output)
    run: dict[str, Callable[[], object]] = {
        "ingest": lambda: ingest(IngestConfig(dataset=str(scenes), output=str(output))),
        "train": lambda: train(
            TrainConfig(data=str(data), output=str(output), preset="tiny", epochs=1)
        ),
        "evaluate": lambda: evaluate(
            EvaluateConfig(model=str(finished / "best"), data=str(data), output=str(output))
        ),
        "batch": lambda: batch(batching),
    }
    with another(held) as first:
        half = Path(held, ".part-abc")
        half.write_text("")
        said = (
            f"{held}: process {first.pid} on {socket.gethostname()} is at work there; wait for "
            "it, or choose"
        )
        with pytest.raises(WorkError, match=said):
            run[stage]()
        assert half.exists(), "what the first is writing is left alone"
        first.send_signal(signal.SIGKILL)
        first.wait()
        run[stage]()
    assert not half.exists()


def test_a_folder_that_was_held_is_free_again_also_after_a_failure(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(KeyError), output_lock(str(tmp_path)):
            raise KeyError
    with output_lock(str(tmp_path)), output_lock(str(tmp_path / "other")):
        pass
    assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"


def test_what_others_are_writing_below_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".part-store").mkdir()
    for file in (".part-a", "deeper/.part-b", "another/.part-c"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("")
    with another(tmp_path / "another"):
        (tmp_path / "another" / ".part-d").write_text("")
        with output_lock(str(tmp_path)):
            left = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob(".part-*")}
    assert left == {".part-store", "another/.part-d"}


# ---- buckets -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A bucket for this process and those that it starts."""
    with (
        pytest.MonkeyPatch.context() as patched,
        gcs_emulator("held", tmp_path_factory.mktemp("gcs")) as environment,
    ):
        for name, value in environment.items():
            patched.setenv(name, value)
        fsspec.filesystem("gs").clear_instance_cache()
        yield "gs://held"


def test_in_a_bucket_the_second_is_refused_and_after_a_kill_of_the_first_it_runs(
    store: str, scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "SILENCE", 20.0)
    config = IngestConfig(dataset=str(scenes), output=f"{store}/data")
    with another(f"{store}/data") as first:
        with pytest.raises(
            WorkError, match=f"process {first.pid} on {socket.gethostname()} is at work there; wait"
        ):
            ingest(config)
        assert not storage.exists(f"{store}/data/manifest.json")
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert storage.exists(f"{store}/data/{locks.LOCK}")
        ingest(config)
    assert not storage.exists(f"{store}/data/{locks.LOCK}")


def test_the_lock_of_a_machine_that_gives_no_sign_of_life_is_none(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "SILENCE", 0.5)
    storage.write_json(
        f"{store}/far/.lock", {"who": "x", "host": "elsewhere", "pid": 1, "run": "a", "beats": 7}
    )
    with output_lock(f"{store}/far"):
        assert storage.read_json(f"{store}/far/.lock")["pid"] == os.getpid()
    storage.write_bytes(f"{store}/far/.lock", b"no lock of ours")
    with output_lock(f"{store}/far"):
        pass


def test_of_two_that_begin_at_once_one_goes_on(store: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", BOTH, f"{store}/both"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and sorted(process.stdout.read().split()) == [
            "held",
            "refused",
        ]


TAKEN = """
import sys, time
from model_lib.io import locks, storage
locks.BEAT = locks.GRACE = 0.1
with locks.output_lock(sys.argv[1]):
    there = storage.read_json(f"{sys.argv[1]}/.lock")
    storage.write_json(f"{sys.argv[1]}/.lock", {**there, "run": "another"})
    time.sleep(60)
    print("went on")
"""


def test_a_shells_background_job_ends_too_which_ignores_interrupts(store: str) -> None:
    command = [sys.executable, "-c", TAKEN, f"{store}/job"]
    ignoring = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)  # noqa: E731
    ended = subprocess.run(
        command, preexec_fn=ignoring, capture_output=True, text=True, timeout=50, check=False
    )
    assert (
        ended.returncode == 130
        and ended.stdout == ""
        and "another run took it over" in ended.stderr
    )


def test_a_run_that_was_taken_for_dead_ends_when_another_took_over(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "BEAT", 0.1)
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # which a process of pytest's ignores
    with pytest.raises(KeyboardInterrupt), output_lock(f"{store}/taken"):
        there = storage.read_json(f"{store}/taken/.lock")
        storage.write_json(f"{store}/taken/.lock", {**there, "run": "another"})
        time.sleep(60)
    signal.signal(signal.SIGINT, before)
    assert json.loads(storage.read_bytes(f"{store}/taken/.lock"))["run"] == "another", (
        "the lock of the other stays"
    )
