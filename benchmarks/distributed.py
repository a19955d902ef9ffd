"""A step of training in several processes of one machine, and what a checkpoint costs it.

    python -m benchmarks.distributed [--preset clip-l-gpt2-medium] [--device cpu] [--processes 2]
    [--images 8]

The same batch, random pixels with five captions per image of lengths like COCO's, is learned in
fresh processes

- by one process with all threads of the machine (on GPUs: by one GPU),
- by several with DistributedDataParallel, as the product trains,
- by several with FSDP2 (`fully_shard` over the same module, the frozen weights left whole): each
  keeps its share of the gradients and of AdamW's moments.

Then one process writes a checkpoint to a local disk as the product does, on a thread while it goes
on, against the same one written before the next step: the time that training loses by each. It
computes with all cores but one here, so that one is free to write, as the whole CPU is where a GPU
computes. It prints a table with the peak memory of a process, and ends with one line of JSON.
"""

import argparse
import json
import os
import tempfile
import time
import uuid
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from benchmarks.timing import peak_gb
from benchmarks.train import coco_like_captions
from model_lib.io.background import Background
from model_lib.model.captioner import Captioner, CaptionerConfig
from model_lib.presets import PRESETS
from model_lib.train.checkpoint import Checkpoints, Position
from model_lib.train.config import TrainConfig, resolve
from model_lib.train.distributed import World, join_world
from model_lib.train.loss import CrossEntropyObjective
from model_lib.train.step import TrainStep


class Sharded(World):
    """A world whose modules are sharded by FSDP2."""

    def parallel(self, module: torch.nn.Module) -> torch.nn.Module:
        frozen = {p for p in module.parameters() if not p.requires_grad}
        mesh = DeviceMesh.from_group(self.gpus, "cuda") if self.gpus else None
        return fully_shard(module, mesh=mesh, ignored_params=frozen, reshard_after_forward=False)


def make_train_step(options: argparse.Namespace, world: World) -> TrainStep:
    torch.manual_seed(0)
    config = CaptionerConfig.from_preset(PRESETS[options.preset])
    config.train_everything = False  # a tower from scratch is trained too, here none is
    model = Captioner(config).to(world.device).train()
    ids = coco_like_captions(options.images, config.decoder_config.vocab_size)
    objective = CrossEntropyObjective(ids, model.start_token)
    training = TrainConfig(
        data="-", output="-", preset=options.preset, ema=0.0, dropout=0.0, clip_norm=1e9
    )
    return TrainStep(model, objective, resolve(training), world, steps=10_000)


def make_batch(options: argparse.Namespace, step: TrainStep) -> tuple[np.ndarray, torch.Tensor]:
    """Return the whole batch's numbers and this process's pixels."""
    batch, size = np.arange(options.images), step.model.image_size
    images = len(step.world.shard(batch))
    return batch, torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8)


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed_steps(options: argparse.Namespace, kind: str) -> dict[str, float]:
    """Be one of the processes: return the median seconds of a step, and this process's peak memory
    in GB."""
    with join_world(options.device) as world:
        if kind == "FSDP2":
            world = Sharded(**vars(world))
        seconds: list[float] = []

        def run() -> None:
            train_step = make_train_step(options, world)
            if kind == "FSDP2":  # the weights are other tensors now, each a share of the whole
                trained = [p for p in train_step.model.parameters() if p.requires_grad]
                optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
                train_step.trained, train_step.optimizer = trained, optimizer
                # The test for finite gradients is not made for shares.
                train_step._step_if_finite = lambda norm: optimizer.step()
            batch, pixels = make_batch(options, train_step)
            for step in range(options.rounds + 1):
                began = time.perf_counter()
                train_step.run(batch, pixels, step)
                wait_for(world.device)
                seconds.append(time.perf_counter() - began)

        memory = peak_gb(run, world.device)
    return {"seconds": median(seconds[1:]), "gb": memory}


def saving(options: argparse.Namespace) -> tuple[float, float, float]:
    """Return the seconds that training loses by a checkpoint, on a thread and at once, and the
    checkpoint's GB."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) - 1))
    with join_world(options.device) as world, tempfile.TemporaryDirectory() as folder:
        train_step = make_train_step(options, world)
        batch, pixels = make_batch(options, train_step)
        checkpoints, seconds = Checkpoints(folder), {}
        nowhere = Position(0, 0, 0, None, 0, {}, {})

        def steps(count: int) -> float:
            began = time.perf_counter()
            for step in range(count):
                train_step.run(batch, pixels, step)
            wait_for(world.device)
            return time.perf_counter() - began

        steps(1)
        size = sum(tensor.nbytes for tensor in train_step.snapshot().values()) / 1e9
        count = options.rounds + 2
        seconds["plain"] = steps(count)
        began = time.perf_counter()
        with Background() as background:
            background.start(partial(checkpoints.write, "step-1", train_step.snapshot(), nowhere))
            steps(count)
            thread = time.perf_counter() - began
        began = time.perf_counter()
        checkpoints.write("step-2", train_step.snapshot(), nowhere)
        at_once = time.perf_counter() - began
    return thread - seconds["plain"], at_once, size


def launch(options: argparse.Namespace, processes: int, kind: str) -> dict[str, float]:
    """Run `timed_steps` in fresh processes; return the slowest one's seconds and the largest
    memory."""
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))
    rendezvous = {
        "run_id": uuid.uuid4().hex,
        "rdzv_backend": "c10d",
        "rdzv_endpoint": "localhost:0",
    }
    config = LaunchConfig(1, 1, processes, max_restarts=0, **rendezvous)
    results = elastic_launch(config, timed_steps)(options, kind).values()
    return {name: max(result[name] for result in results) for name in ("seconds", "gb")}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="clip-l-gpt2-medium", choices=list(PRESETS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--images", type=int, default=8, help="images of a step, over all processes"
    )
    parser.add_argument("--rounds", type=int, default=2, help="timed steps of each case")
    options = parser.parse_args()
    name = (
        torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {os.cpu_count()} cores"
    )
    kinds = ["one process", "DDP", "FSDP2"]
    figures = {
        kind: launch(options, 1 if kind == "one process" else options.processes, kind)
        for kind in kinds
    }

    print(f"\n{name}, torch {torch.__version__}; {options.images} images a step\n")
    print(f"{'':<14}{'seconds a step':>16}{'images/s':>12}{'GB a process':>14}")
    speeds = {kind: options.images / figure["seconds"] for kind, figure in figures.items()}
    for kind, figure in figures.items():
        seconds, gigabytes = figure["seconds"], figure["gb"]
        print(f"{kind:<14}{seconds:>16.2f}{speeds[kind]:>12.2f}{gigabytes:>14.1f}")
    results: list[dict[str, Any]] = []
    for baseline in ("one process", "FSDP2"):
        ours, theirs = speeds["DDP"], speeds[baseline]
        row = {
            "case": f"DDP, {options.processes} processes",
            "baseline": baseline,
            "unit": "images/s",
            "ours": round(ours, 2),
            "theirs": round(theirs, 2),
            "ratio": round(ours / theirs, 2),
            "peak_memory_gb": figures["DDP"]["gb"],
            "their_memory_gb": figures[baseline]["gb"],
        }
        results.append(row)
    thread, at_once, size = saving(options)
    lost = f"{thread:.1f} s lost with a thread, {at_once:.1f} s without"
    print(f"\na checkpoint of {size:.1f} GB: {lost}")
    row = {
        "case": f"checkpoint of {size:.1f} GB",
        "baseline": "written before the next step",
        "unit": "seconds lost",
        "ours": round(thread, 2),
        "theirs": round(at_once, 2),
        "ratio": round(at_once / max(thread, 1e-3), 2),
        "peak_memory_gb": None,
    }
    results.append(row)
    document = {"benchmark": "distributed", "device": name, "torch": torch.__version__}
    print(json.dumps({**document, "results": results}))


if __name__ == "__main__":
    main()
