"""Time and peak memory of cases that alternate in one process, so that drift affects all alike."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def median_seconds(
    cases: list[Callable[[], object]], rounds: int, device: torch.device
) -> list[float]:
    """Return each case's median time over `rounds`, after a warm-up round."""

    def once(case: Callable[[], object]) -> float:
        started = time.perf_counter()
        case()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    for case in cases:
        once(case)
    times = [[once(case) for case in cases] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def peak_gb(case: Callable[[], object], device: torch.device) -> float:
    """Return the peak memory while `case` runs, in GB, with weights: the GPU's or the process's."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        case()
        return round(torch.cuda.max_memory_allocated() / 1e9, 2)
    Path("/proc/self/clear_refs").write_text("5")
    case()
    status = Path("/proc/self/status").read_text()
    return round(int(status.partition("VmHWM:")[2].split()[0]) / 1e6, 2)
