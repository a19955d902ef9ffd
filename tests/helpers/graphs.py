"""A stand-in for CUDA graphs on a CPU: work is recorded as its operations, on the memory that they
used, and replayed without any of its Python."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "_unique")
"""Operations whose results the host waits for, which a capture refuses."""


class _Log(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(name in str(func) for name in FORBIDDEN), f"{func} while recording"
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


def recorder() -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Return a recorder as `decoding.RECORDERS` has them."""

    def record(work: Callable[[], None]) -> Callable[[], None]:
        work()  # as before a capture
        log = _Log()
        with log:
            work()

        def replay() -> None:
            for func, args, kwargs, result in log.calls:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    # A view's memory, and what was changed in place, is the same.
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

        return replay

    return record
