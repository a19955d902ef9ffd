"""Saving checkpoints and the best model on a thread, while training goes on."""

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model_lib.io import storage
from model_lib.io.background import Background
from model_lib.io.errors import store_errors
from model_lib.train.checkpoint import Checkpoints, Position
from model_lib.train.config import ResolvedConfig
from model_lib.train.step import TrainStep


class Saver(Background):
    """Saves what the main process has trained; one piece of work at a time."""

    def __init__(self, config: ResolvedConfig, train_step: TrainStep) -> None:
        super().__init__()
        self.config, self.train_step = config, train_step
        self.checkpoints = Checkpoints(config.output, config.checkpoints_kept)
        self.best_uri = storage.join(config.output, "best")
        self.step, self.time = 0, time.monotonic()

    def due(self, step: int) -> bool:
        """Return whether it is time for a checkpoint, and the last one is written."""
        minutes, steps = self.config.checkpoint_minutes, self.config.checkpoint_steps
        late = time.monotonic() - self.time > 60 * minutes and not self.busy
        return late or (steps > 0 and step - self.step >= steps)

    def copy_weights(self) -> dict[str, Tensor]:
        """Return copies of all the model's weights, float32 on the CPU."""
        self.wait()  # for the copies before, so that memory holds one set
        return {
            name: tensor.detach().to("cpu", torch.float32, copy=True)
            for name, tensor in self.train_step.model.state_dict().items()
        }

    def save(self, position: Position, best: tuple[Mapping[str, Tensor], Any] | None) -> None:
        """Start to write the best model (weights, content of training.json), if there is a new one,
        and then a checkpoint."""
        self.wait()
        tensors = self.train_step.snapshot()
        suffix = "-validated" if position.validated == position.step else ""

        def write() -> None:
            if best is not None:
                self._write_best(*best)
            self.checkpoints.write(f"step-{position.step:08d}{suffix}", tensors, position)

        self.start(write)
        self.step, self.time = position.step, time.monotonic()

    def _write_best(self, weights: Mapping[str, Tensor], record: Any) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            with store_errors(scratch, "written"):
                self.train_step.model.save_pretrained(scratch, state_dict=weights)
            storage.upload_folder(scratch, self.best_uri)
        storage.write_json(storage.join(self.best_uri, "training.json"), record)

    def require_room(self) -> None:
        """Raise `UserError` if the disk has no room for what the run will write."""
        parameters = list(self.train_step.model.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        copies = 4 if self.config.ema else 3  # weights, two moments, their average
        checkpoint, best = 4 * trained * copies, 4 * sum(p.numel() for p in parameters)
        kept = self.config.checkpoints_kept
        files = Path(storage.filesystem(self.config.output)[1]).rglob("*")
        present = sum(file.stat().st_size for file in files if file.is_file())
        what = f"{kept} checkpoints, one more while it is written, and the best model"
        storage.require_room(self.config.output, (kept + 1) * checkpoint + best - present, what)
