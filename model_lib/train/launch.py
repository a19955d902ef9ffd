"""Training on all GPUs of one or several machines: a process for each, started and watched by
torchrun's own launcher.

torchrun itself would end with 1 whatever its processes ended with, and hide their lines in a box of
its own.
"""

import logging
import multiprocessing
import os
import signal
from typing import Any

import torch

from model_lib.errors import WorkError, first_line
from model_lib.exits import exit_in_one_line
from model_lib.io.cpus import cpu_count
from model_lib.tracking.server import NO_TRACKING, Tracking
from model_lib.train.config import TrainConfig, Trained
from model_lib.train.distributed import started_by_launcher

MEETING = 3600
"""Seconds for which machines wait for each other: their nodes may start one after the other."""


def train_here(config: TrainConfig, tracking: Tracking = NO_TRACKING) -> Trained:
    """Train one candidate with all GPUs of this machine, or with `config.processes` processes.

    Where Kubeflow Trainer says so in the environment, other machines do the same at the same time,
    and all train together. A process that torchrun started is one of its processes already, and
    starts no others.

    Raises:
        UserError: see `train`.
        WorkError: a process was killed.
        SystemExit: the processes failed, each telling why; with the exit code of the one that did
            first.
    """
    count, machines = processes(config), int(os.environ.get("PET_NNODES", 1))
    if count * machines == 1 or started_by_launcher():
        from model_lib.train.training import train

        return train(config, tracking)
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for chatty in (
        "torch.distributed",
        "torch.multiprocessing",
    ):  # the processes say themselves what is wrong
        logging.getLogger(chatty).setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cpu_count() // count)))
    multiprocessing.set_forkserver_preload(
        ["model_lib.train.training"]
    )  # imported once, and not once a process
    launch = LaunchConfig(
        min_nodes=machines,
        max_nodes=machines,
        nproc_per_node=count,
        run_id="captioner",  # by which the machines know each other
        max_restarts=0,  # what failed would fail again; a lost machine is the pipeline's to retry
        monitor_interval=0.2,
        start_method="forkserver",
        **_meeting(machines),
    )
    try:
        results: dict[int, Trained] = elastic_launch(launch, _work)(config, tracking)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        if killed := [code for code in codes if code < 0]:  # which could not tell why
            name = signal.Signals(-killed[0]).name
            raise WorkError(
                f"{config.name}: one of {count} processes was ended by {name}, as happens where "
                "memory runs out; start "
                "again: it goes on from its last checkpoint"
            ) from None
        raise SystemExit(
            2 if 2 in codes else next((code for code in codes if code > 1), 1)
        ) from None
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from None
    except (RendezvousError, DistError) as error:
        raise WorkError(
            f"{config.name}: its {machines} machines have not met: {first_line(error)}"
        ) from error
    return next(iter(results.values()))


def _meeting(machines: int) -> dict[str, Any]:
    """Return the launcher's options that say where the processes find each other: at the first
    machine."""
    if machines == 1:
        return {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    first = f"{os.environ['PET_MASTER_ADDR']}:{os.environ['PET_MASTER_PORT']}"
    configs = {"rank": int(os.environ["PET_NODE_RANK"]), "timeout": MEETING}
    return {"rdzv_backend": "static", "rdzv_endpoint": first, "rdzv_configs": configs}


def processes(config: TrainConfig) -> int:
    """Return how many processes train on this machine."""
    if config.processes:
        return config.processes
    return max(1, torch.cuda.device_count()) if config.device in ("auto", "cuda") else 1


def _work(config: TrainConfig, tracking: Tracking) -> Trained:
    """Be one of the processes."""
    from model_lib.train.training import train

    logging.basicConfig(format="captioner: %(message)s", level=logging.WARNING)
    with exit_in_one_line():
        return train(config, tracking)
