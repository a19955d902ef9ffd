"""The processes that train one model together.

torchrun and Kubeflow Trainer start them and put each one's rank into its environment. A single
process is a world of size 1, in which nothing here costs anything.
"""

import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from model_lib.errors import UserError, exit_code
from model_lib.io.cpus import cpu_count
from model_lib.model.precision import choose_device

TIMEOUT = timedelta(hours=6)
"""How long a process waits for the others, for example while one fills a cache. A death is noticed
at once."""
GPU_TIMEOUT = timedelta(minutes=10)
"""How long a GPU waits for the others in a step, for which all are ready: NCCL notices no death."""
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class World:
    """The processes of a training run, and this one's rank and device among them."""

    device: torch.device
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Rank among the processes of this machine."""
    local_size: int = 1
    """Processes of this machine."""
    gpus: dist.ProcessGroup | None = None
    """By which their GPUs exchange gradients; the processes themselves have torch's default group,
    over gloo."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that logs, shows progress and writes."""
        return self.rank == 0

    @property
    def single_process(self) -> bool:
        return self.size == 1

    def threads(self, number: int) -> int:
        """Return `number`, or if that is 0 this process's share of the machine's cores."""
        return number or max(1, cpu_count() // self.local_size)

    def wait_for_all(self) -> None:
        """Return when all processes have come here, without waiting for the device."""
        if not self.single_process:
            dist.barrier()

    def shard(self, batch: np.ndarray) -> np.ndarray:
        """Return this process's images of a batch; the batch's first image if it `has_no_rows`.

        Every process has to take part in every step.
        """
        rows = batch[self.rank :: self.size]
        return rows if len(rows) else batch[:1]

    def has_no_rows(self, batch: np.ndarray) -> bool:
        """Return whether a batch is too small to have an image for this process."""
        return len(batch) <= self.rank

    def share(self, items: Sequence[_Value]) -> Sequence[_Value]:
        """Return every `size`th item, from `rank` on; there may be none."""
        return items[self.rank :: self.size]

    def any(self, *flags: bool) -> list[bool]:
        """Return for each flag whether it is set in any process, without waiting for the device."""
        if self.single_process:
            return list(flags)
        values = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return [bool(value) for value in values]

    def gather(self, value: _Value) -> list[_Value]:
        """Return the value of each process, in the order of their ranks."""
        if self.single_process:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def run_on_main(self, work: Callable[[], _Value]) -> _Value:
        """Run `work` in the first process and return its result in all; see `run_on_all`."""
        results = self.gather(self.run_on_all(lambda: work() if self.is_main else None))
        return results[0]  # type: ignore[return-value]

    def run_on_all(self, work: Callable[[], _Value]) -> _Value:
        """Run `work` in each process; if it fails in some, the first of them raises and all others
        exit.

        So no process waits for one that failed, and only one error is printed.
        """
        if self.single_process:
            return work()
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            failure = error
        codes = self.gather(0 if failure is None else exit_code(failure))
        failed = [rank for rank, code in enumerate(codes) if code]
        if not failed:
            return result  # type: ignore[return-value]
        if failure is not None and failed[0] == self.rank:
            raise failure
        time.sleep(1)  # the launcher ends all when one has ended; the first prints its error
        raise SystemExit(codes[failed[0]])

    def parallel(self, module: nn.Module) -> nn.Module:
        """Return the module in DistributedDataParallel, which averages the gradients.

        It is not given the device, to which it would copy the inputs and wait for that.
        """
        if self.single_process:
            return module
        with warnings.catch_warnings():  # about an option's new name, unknown to torch 2.11
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(
                module,
                process_group=self.gpus,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )

    def no_sync(self, module: nn.Module, last: bool) -> AbstractContextManager:
        """Return the context of a backward pass: only a step's last one averages gradients."""
        if isinstance(module, DistributedDataParallel) and not last:
            return module.no_sync()
        return nullcontext()


def started_by_launcher() -> bool:
    """Whether torchrun, or something like it, started this process."""
    return {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= set(os.environ)


@contextmanager
def join_world(device: str) -> Iterator[World]:
    """Yield this process's world: those that its launcher started, or itself alone.

    Args:
        device: "auto", "cpu", "cuda" or "mps".

    Raises:
        UserError: the device is not available, or not made for several processes.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if not started_by_launcher() or size == 1:
        yield World(choose_device(device))
        return
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", timeout=TIMEOUT)
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    world = World(torch.device("cpu"), rank, size, local_rank, local_size)
    try:
        own, gpus = world.run_on_all(lambda: _own_device(device, local_rank)), None
        if own.type == "cuda":
            gpus = dist.new_group(timeout=GPU_TIMEOUT, backend="nccl", device_id=own)
        yield replace(world, device=own, gpus=gpus)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        time.sleep(1)  # another process is gone: the launcher must see first how that one ended
        raise SystemExit(1) from None
    dist.destroy_process_group()  # not after a failure: it would wait for those that are gone


def _own_device(device: str, local_rank: int) -> torch.device:
    """Return the device of a process among several of this machine."""
    if device in ("auto", "cuda") and torch.cuda.is_available():
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise UserError(
                f"processes: more than this machine's {count} GPUs; give --processes {count}"
            )
        # Before anything else, which would take memory of the first GPU for each process.
        torch.cuda.set_device(local_rank)
    kind = choose_device(device).type
    if kind == "mps":
        raise UserError("device mps: trains in one process; start captioner train without torchrun")
    return torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
