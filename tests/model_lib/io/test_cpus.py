"""The cores that a container leaves; in a real one: tests/containers."""

import os
from pathlib import Path

import pytest

from model_lib.io.cpus import cpu_count

QUOTA, PERIOD = "cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 16),
        ({"cpu.max": "max 100000\n"}, 16),
        ({"cpu.max": "400000 100000\n"}, 4),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "5000 100000\n"}, 1),
        ({"cpu.max": ""}, 16),
        ({QUOTA: "-1\n", PERIOD: "100000\n"}, 16),
        ({QUOTA: "250000\n", PERIOD: "100000\n"}, 3),
    ],
)
def test_a_containers_limit_counts(
    files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("model_lib.io.cpus.LIMITS", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(16)))
    assert cpu_count() == expected


def test_so_does_what_a_process_may_run_on() -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert cpu_count() == 1
    finally:
        os.sched_setaffinity(0, allowed)
