"""How many CPU cores this process may use: in a container, fewer than its machine has."""

import contextlib
import math
import os
from pathlib import Path

LIMITS = Path("/sys/fs/cgroup")
"""Where Linux shows a container its limits."""


def cpu_count() -> int:
    """Return the number of cores that this process may run on, up to its container's limit."""
    usable = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        usable = len(os.sched_getaffinity(0))
    # Control groups, version 2 and 1.
    for files in ["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]:
        with contextlib.suppress(OSError, ValueError):  # not that version, or no limit: "max"
            quota, period = (
                int(number) for file in files for number in (LIMITS / file).read_text().split()
            )
            if quota > 0:
                usable = min(usable, math.ceil(quota / period))
    return usable
