"""The end of a pipeline's step: an exit code and one line, which Kubernetes keeps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.caption.component import caption
from model_lib import exits
from model_lib.errors import UserError, WorkError
from model_lib.exits import MISTAKE, exit_in_one_line

PART = {"plan": "x/listing.parquet", "worker": 0.0, "workers": 1.0}


@pytest.fixture()
def termination_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that Kubernetes mounts into each container."""
    monkeypatch.setattr(exits, "TERMINATION_LOG", tmp_path / "termination-log")
    (tmp_path / "termination-log").touch()
    return tmp_path / "termination-log"


def raising(error: Exception) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("work", "code", "line"),
    [
        (lambda: caption.python_func(PART, "/gone"), 2, "/gone/x/plan.json: no such file"),
        (raising(UserError("a: is wrong")), 2, "captioner: error: a: is wrong"),
        (raising(WorkError("b: fails")), 1, "captioner: failed: b: fails"),
        (raising(MemoryError()), 1, "captioner: failed: out of memory; use a larger machine"),
    ],
    ids=["step", "mistake", "failure", "memory"],
)
def test_a_step_ends_in_one_line_that_kubernetes_keeps(
    work: Callable[[], Any],
    code: int,
    line: str,
    termination_log: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended, exit_in_one_line():
        work()
    kept = termination_log.read_text()
    assert ended.value.code == code and line in kept and kept == capsys.readouterr().err
    assert (MISTAKE in kept) == (code == 2) and kept.count("\n") == 1


def test_a_defect_is_shown_with_its_traceback(termination_log: Path) -> None:
    with pytest.raises(ZeroDivisionError), exit_in_one_line():
        raise ZeroDivisionError
    assert not termination_log.read_text()


def test_outside_of_a_pod_no_file_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exits, "TERMINATION_LOG", tmp_path / "none")
    with pytest.raises(SystemExit), exit_in_one_line():
        raise UserError("a: is wrong")
    assert not (tmp_path / "none").exists()
