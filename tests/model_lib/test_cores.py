"""The cores that a container leaves."""

import os
from pathlib import Path

import pytest

from model_lib.cores import cores


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("max 100000\n", 16), ("400000 100000\n", 4), ("150000 100000\n", 2), ("5000 100000\n", 1), ("", 16), (None, 16)],
)
def test_a_containers_limit_counts(
    limit: str | None, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if limit is not None:
        (tmp_path / "cpu.max").write_text(limit)
    monkeypatch.setattr("model_lib.cores.QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(16)))
    assert cores() == expected


def test_so_does_what_a_process_may_run_on() -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
