"""Training on all GPUs of one or several machines: a process for each, by torchrun's launcher.

torchrun itself would exit with 1 for every exit code of its processes, and print their errors in a
box of its own.
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
from model_lib.tracking.runs import NO_TRACKING, Tracking
from model_lib.train.config import TrainConfig, Trained
from model_lib.train.distributed import started_by_launcher

JOIN_TIMEOUT = 3600
"""Seconds for which machines wait for each other: their nodes may start one after the other."""


def train_here(config: TrainConfig, tracking: Tracking = NO_TRACKING) -> Trained:
    """Train one candidate with all GPUs of this machine, or with `config.processes` processes.

    Where Kubeflow Trainer has set the environment, several machines run this at the same time and
    train together. A process that torchrun started starts no others.

    Raises:
        UserError: see `train`.
        WorkError: a process was killed.
        SystemExit: the processes failed and printed why; with the exit code of the first failure.
    """
    gpus = torch.cuda.device_count() if config.device in ("auto", "cuda") else 0
    count, machines = config.processes or gpus or 1, int(os.environ.get("PET_NNODES", 1))
    if count * machines == 1 or started_by_launcher():
        from model_lib.train.training import train

        return train(config, tracking)
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("torch.distributed", "torch.multiprocessing"):  # the processes print their errors
        logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cpu_count() // count)))
    multiprocessing.set_forkserver_preload(["model_lib.train.training"])  # imported only once
    launch = LaunchConfig(
        min_nodes=machines,
        max_nodes=machines,
        nproc_per_node=count,
        run_id="captioner",  # the same on all machines
        max_restarts=0,  # what failed would fail again; a lost machine is the pipeline's to retry
        monitor_interval=0.2,
        start_method="forkserver",
        **_rendezvous(machines),
    )
    try:
        results: dict[int, Trained] = elastic_launch(launch, _train_process)(config, tracking)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        killed = [code for code in codes if code < 0]
        if not killed:
            raise SystemExit(2 if 2 in codes else max(codes)) from None
        name = signal.Signals(-killed[0]).name
        cause = ", as happens where memory runs out" if name == "SIGKILL" else ""
        raise WorkError(
            f"{config.name}: one of {count} processes was ended by {name}{cause}; start again: it "
            "goes on from its last checkpoint"
        ) from None
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from None
    except (RendezvousError, DistError) as error:
        raise WorkError(
            f"{config.name}: its {machines} machines have not met: {first_line(error)}"
        ) from error
    return next(iter(results.values()))


def _rendezvous(machines: int) -> dict[str, Any]:
    """Return the launcher's options for where the processes meet: at the first machine."""
    if machines == 1:
        return {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    endpoint = f"{os.environ['PET_MASTER_ADDR']}:{os.environ['PET_MASTER_PORT']}"
    configs = {"rank": int(os.environ["PET_NODE_RANK"]), "timeout": JOIN_TIMEOUT}
    return {"rdzv_backend": "static", "rdzv_endpoint": endpoint, "rdzv_configs": configs}


def _train_process(config: TrainConfig, tracking: Tracking) -> Trained:
    from model_lib.train.training import train

    logging.basicConfig(format="captioner: %(message)s", level=logging.WARNING)
    with exit_in_one_line():
        return train(config, tracking)
