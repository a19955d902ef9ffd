"""`metrics.jsonl`: every point of a training's curves, once, whatever interrupts it."""

import json
from pathlib import Path

import fsspec
import pytest

from model_lib import UserError
from model_lib.tracking.metrics import read_curves
from model_lib.tracking.runs import NO_TRACKING, Run


def start(folder: object, step: int = 0) -> Run:
    return NO_TRACKING.start("name", None, {}, {}, str(folder), step)


def test_a_training_that_resumes_drops_the_points_after_its_step(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        for step in range(1, 6):
            run.log({"train_loss": float(step)}, step)
        run.log({"val_loss": 9.0}, 3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "time_ms"')  # cut by a kill
    with start(tmp_path, step=4) as run:
        run.log({"train_loss": 50.0}, 5)
    assert read_curves(f"{tmp_path}/best") == {
        "train_loss": [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 50.0)],
        "val_loss": [(3, 9.0)],
    }
    with start(tmp_path) as run:
        run.log({"train_loss": 7.0}, 1)
    assert read_curves(f"{tmp_path}/best") == {"train_loss": [(1, 7.0)]}
    assert read_curves("owner/model") == {}


def test_times_never_go_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([5.0, 3.0, 2.0])
    monkeypatch.setattr("time.time", lambda: next(seconds))
    with start(tmp_path) as run:
        run.log({"train_loss": 1.0}, 1)
        run.log({"train_loss": 1.0}, 2)
    with start(tmp_path, step=2) as run:
        run.log({"train_loss": 1.0}, 3)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["time_ms"] for line in lines] == [5000, 5000, 5000]


def test_in_a_bucket_the_points_are_there_once_they_are_flushed() -> None:
    folder = "memory://metrics/run"
    with start(folder) as run:
        run.log({"train_loss": 2.0}, 1)
        run.flush()
        assert read_curves(f"{folder}/best") == {"train_loss": [(1, 2.0)]}
    with start(folder, step=1) as run:
        run.log({"train_loss": 1.0}, 2)
    assert read_curves(f"{folder}/best") == {"train_loss": [(1, 2.0), (2, 1.0)]}
    fsspec.filesystem("memory").rm("/metrics", recursive=True)


def test_another_file_of_that_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"loss": 1}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: "):
        read_curves(f"{tmp_path}/best")
    with pytest.raises(UserError, match=r"metrics\.jsonl: "), start(tmp_path, step=1):
        pass
