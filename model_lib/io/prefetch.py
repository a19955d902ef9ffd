"""A map whose results threads compute ahead."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from model_lib.io.cpus import cpu_count

PREFETCH = 4
"""Batches that are read and decoded ahead of the model."""
Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch_map(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int = 0,
    depth: int = PREFETCH,
) -> Generator[Result]:
    """Yield `function(item)` for each item, in order, computed ahead on threads.

    An exception is raised in its item's place. Closing the generator drops what has not begun.

    Args:
        function: called on the threads.
        items: taken one by one, on the caller's thread.
        workers: number of threads; 0: one a core.
        depth: results that are computed, or being computed, ahead.
    """
    items = iter(items)
    pool = ThreadPoolExecutor(workers or cpu_count())
    try:
        pending = deque(pool.submit(function, item) for item in islice(items, depth))
        while pending:
            future = pending.popleft()
            pending.extend(pool.submit(function, item) for item in islice(items, 1))
            yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
