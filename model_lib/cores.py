"""How many CPU cores this process may use: in a container, fewer than its machine has."""

import contextlib
import math
import os
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""A control group's limit (Linux, cgroup v2): microseconds of computing, "max" for any, in so many microseconds."""


def cores() -> int:
    """Return the number of cores, at least 1: those that this process may run on, up to its container's limit.

    Each thread beyond them would take its turn from another, and a limit that is used up stops all of them for a while.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no control groups here, or no limit
        quota, period = map(int, QUOTA.read_text().split())
        usable = min(usable, max(1, math.ceil(quota / period)))
    return usable
