"""One step of training: from a batch's pixels to new weights, in one process or several.

A step is a function of the weights, the optimiser's state and the step's number: its random numbers
too follow from the seed and that number. So a step can be taken again, after a kill or with smaller
parts where memory ran out.
"""

import logging
import math
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model_lib.errors import UserError, WorkError
from model_lib.model.captioner import Captioner
from model_lib.model.precision import autocast, autocast_dtype, loss_scaler
from model_lib.train.config import TrainConfig
from model_lib.train.distributed import World
from model_lib.train.ema import EMA
from model_lib.train.objectives import Objective, loss_of

log = logging.getLogger(__name__)
MOST_SKIPPED = 25
"""Steps in a row without finite gradients that end a run; float16 needs some to find its scale."""


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Return the rate of `step` (from 0): a linear rise over the share `warmup` of `steps`, then
    half a cosine."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW over the trained weights; norms and biases do not decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.99), fused=True)


def require_compiler(device: torch.device) -> None:
    """Raise `UserError` if torch.compile cannot work here."""
    compiler = "g++" if device.type == "cpu" else "gcc"
    if shutil.which(compiler) is None:
        raise UserError(
            f"compile: torch.compile needs {compiler} here (apt-get install {compiler})"
        )


class _Loss(nn.Module):
    """From pixels to summed loss and reward, as one module, so that DistributedDataParallel can
    wrap it."""

    def __init__(
        self, model: Captioner, objective: Objective, label_smoothing: float, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.model, self.objective, self.label_smoothing, self.dtype = (
            model,
            objective,
            label_smoothing,
            dtype,
        )

    def encode(self, pixels: Tensor) -> Tensor:
        """Return the visual tokens [B, S, E] of pixels, uint8 [B, 3, H, W], on the model's
        device."""
        pixels = pixels.to(self.model.device, non_blocking=True)
        if self.model.config.train_everything:
            with autocast(self.dtype, self.model.device):
                return self.model.encode(pixels)
        return self.model.encode(pixels)  # its weights are in the right format already

    def forward(self, pixels: Tensor, numbers: list[int], step: int) -> tuple[Tensor, float]:
        features = self.encode(pixels)
        with autocast(self.dtype, features.device):
            learned = self.objective.make_targets(self.model, features, numbers, step)
        with autocast(
            self.dtype, features.device
        ):  # anew: what it cast while drawing cannot take gradients
            return loss_of(self.model, features, learned, self.label_smoothing), learned.reward


class Learner:
    """A captioner that learns, with its optimiser, its average and what it learns.

    Args:
        model: on the device of `world`.
        objective: what it learns.
        config: of training.
        world: the processes that share a batch; each has a learner, and all have the same weights
            after each step.
        steps: of the whole run, for the learning rate.
    """

    def __init__(
        self, model: Captioner, objective: Objective, config: TrainConfig, world: World, steps: int
    ) -> None:
        self.model, self.objective, self.config, self.world, self.steps = (
            model,
            objective,
            config,
            world,
            steps,
        )
        self.device = world.device
        self.dtype = autocast_dtype(config.precision, self.device)
        self.scaler = loss_scaler(self.dtype, self.device)
        self._prepare_model()
        self.optimizer = make_optimizer(model, config)
        self.average = EMA(model, config.ema or 0.0)
        self.loss = _Loss(model, objective, config.label_smoothing or 0.0, self.dtype)
        self.in_parallel = world.parallel(self.loss)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.micro_batch_size = config.micro_batch_size
        self.skipped, self.skipped_in_a_row = torch.zeros(2, device=self.device)

    def _prepare_model(self) -> None:
        model, config = self.model, self.config
        if self.dtype != torch.float32:
            model.freeze_into(self.dtype)
        for block in model.decoder.blocks:
            block.dropout.p = config.dropout or 0.0
            if config.compile:
                block.compile(dynamic=True)
        model.decoder.recompute = config.recompute

    def learn(self, batch: np.ndarray, pixels: Tensor, step: int) -> dict[str, Tensor | float]:
        """Take one step over a batch; return what to log, on the device still and of this process
        alone.

        Args:
            batch: numbers of all its images, int [N].
            pixels: of this process's share, uint8 [B, 3, H, W].
            step: from 0.

        Raises:
            WorkError: the device has too little memory for this process's share.
        """
        rate = learning_rate(step, self.steps, self.config.learning_rate, self.config.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss, reward = self._gradients_that_fit(batch, pixels, step)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.trained, self.config.clip_norm)
        self._step_if_finite(norm)
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update()
        return {"train_loss": loss, "reward": reward, "learning_rate": rate, "gradient_norm": norm}

    def _gradients_that_fit(
        self, batch: np.ndarray, pixels: Tensor, step: int
    ) -> tuple[Tensor, float]:
        """Return `_gradients`, of smaller parts from now on if they did not fit into the device's
        memory."""
        while True:
            try:
                return self._gradients(batch, pixels, step)
            except torch.OutOfMemoryError:
                size = self.micro_batch_size or len(pixels)
                if (
                    size == 1 or not self.world.single_process
                ):  # the others wait in the middle of their backward pass
                    remedy = (
                        "give a smaller --micro_batch_size"
                        if size > 1
                        else "--recompute needs less"
                    )
                    raise WorkError(
                        f"{self.device}: out of memory in step {step} with {size} images at once; "
                        f"{remedy} and start "
                        "again: it goes on from its last checkpoint"
                    ) from None
                self.micro_batch_size = size // 2
            self.optimizer.zero_grad(set_to_none=True)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            log.warning(
                "%s: out of memory in step %d with %d images at once; going on with %d, and %d "
                "gradients added up",
                self.device,
                step,
                size,
                self.micro_batch_size,
                -(-len(pixels) // self.micro_batch_size),
            )

    def _gradients(self, batch: np.ndarray, pixels: Tensor, step: int) -> tuple[Tensor, float]:
        """Compute the gradients of the batch's mean loss; return this process's part of that loss
        and of the reward."""
        seed = np.random.default_rng([self.config.seed, step, self.world.rank]).integers(2**63)
        torch.manual_seed(int(seed))
        numbers, idle = self.world.shard(batch).tolist(), self.world.has_no_rows(batch)
        amount = self.objective.normalizer(batch.tolist())
        size = self.micro_batch_size or len(numbers)
        total, reward = torch.zeros((), device=self.device), 0.0
        for start in range(0, len(numbers), size):
            part = slice(start, start + size)
            with self.world.no_sync(self.in_parallel, last=start + size >= len(numbers)):
                loss, rewards = self.in_parallel(pixels[part], numbers[part], step)
                mean = loss * (
                    0.0 if idle else self.world.size / amount
                )  # processes' gradients are averaged
                self.scaler.scale(mean).backward()
            if not idle:
                total, reward = total + loss.detach(), reward + rewards
        return total / amount, reward / amount

    def _step_if_finite(self, norm: Tensor) -> None:
        """Let the optimiser take a step, unless a gradient is not a number to work with: one bad
        batch ruins nothing.

        The test stays on the device, where the fused AdamW reads it from `found_inf` as it does for
        a loss scaler.
        """
        bad = (~norm.isfinite()).float()
        self.skipped += bad
        self.skipped_in_a_row.add_(1).mul_(bad)
        if not self.scaler.is_enabled():
            self.optimizer.found_inf = bad  # type: ignore[attr-defined]
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def require_progress(self, step: int) -> int:
        """Return how many steps were left out for gradients that were not finite; `WorkError` if
        the last many were."""
        if self.skipped_in_a_row >= MOST_SKIPPED:
            raise WorkError(
                f"{self.config.name}: the gradients of the last {int(self.skipped_in_a_row)} "
                f"steps up to {step} are "
                "not finite; no weight was changed by them, and the last checkpoint is whole; "
                "lower the learning rate "
                f"({self.config.learning_rate}) or train in float32"
            )
        return int(self.skipped)

    def state(self) -> dict[str, Any]:
        """Return what goes on from step to step besides tensors of weights, as JSON."""
        return {
            "averaged": self.average.updates,
            "scaler": self.scaler.state_dict(),
            "skipped": [int(self.skipped), int(self.skipped_in_a_row)],
        }

    def restore(self, averages: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned; weights and the optimiser's moments are there
        already."""
        self.average.restore(averages, state["averaged"])
        self.scaler.load_state_dict(state["scaler"])
        for counter, value in zip(
            (self.skipped, self.skipped_in_a_row), state["skipped"], strict=True
        ):
            counter.fill_(value)
