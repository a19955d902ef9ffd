"""How many CPU cores this process may use: in a container, fewer than its machine has."""

import contextlib
import math
import os
from pathlib import Path

LIMITS = Path("/sys/fs/cgroup")
"""Where Linux shows a container its limits."""


def cpu_count() -> int:
    """Return the number of cores, at least 1: those that this process may run on, up to its
    container's limit.

    Each thread beyond them would take its turn from another, and a limit that is used up stops all
    of them for a while.
    """
    usable = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    for files in (
        ["cpu.max"],
        ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"],
    ):  # control groups, version 2 and 1
        with contextlib.suppress(OSError, ValueError):  # not that version, or no limit: "max"
            quota, period = (
                int(number) for file in files for number in (LIMITS / file).read_text().split()
            )
            if quota > 0:
                usable = min(usable, math.ceil(quota / period))
    return usable
