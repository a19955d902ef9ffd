"""One step of training: from a batch's pixels to new weights, in one process or several.

A step is a function of the weights, the optimizer's state and the step's number; its random numbers
follow from the seed and that number. So a step can be repeated, after a kill or in smaller parts
when memory runs out.
"""

import logging
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model_lib.errors import UserError, WorkError
from model_lib.model.captioner import Captioner
from model_lib.model.precision import autocast, autocast_dtype, compile_problem, loss_scaler
from model_lib.model.tokens import PackedCaptions
from model_lib.train.config import ResolvedConfig
from model_lib.train.distributed import World
from model_lib.train.ema import EMA
from model_lib.train.loss import Objective, head_loss, states

log = logging.getLogger(__name__)
NEW = re.compile(r"\.(crossattention|ln_cross_attn|ln_visual)\.")
"""The weights that no pretrained model has."""
MAX_SKIPPED = 25
"""Steps in a row without finite gradients that end a run; float16 needs some to find its scale."""


def learning_rate(step: int, steps: int, warmup: float) -> float:
    """Return the learning rate of `step` (from 0) as a share of its peak: a linear rise over the
    share `warmup` of `steps`, then half a cosine."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def make_optimizer(model: Captioner, config: ResolvedConfig) -> torch.optim.AdamW:
    """Return AdamW over the trained weights, each group with the `peak` of its learning rate.

    New weights learn faster than pretrained ones; norms and biases do not decay.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if NEW.search(name) or config.pretrained_learning_rate is None:
            peak = config.learning_rate
        elif name.startswith("vision."):
            peak = config.vision_learning_rate
        else:
            peak = config.pretrained_learning_rate
        decay = config.weight_decay if parameter.ndim >= 2 else 0.0
        groups.setdefault((peak, decay), []).append(parameter)
    params = [
        {"params": members, "lr": peak, "peak": peak, "weight_decay": decay}
        for (peak, decay), members in groups.items()
    ]
    return torch.optim.AdamW(params, betas=(0.9, 0.99), fused=True)


def should_compile(choice: bool | None, device: torch.device) -> bool:
    """Return whether to compile: by `choice`, or on CUDA if torch.compile works here.

    Raises:
        UserError: `choice` is True, and torch.compile cannot work here.
    """
    problem = compile_problem(device.type)
    if choice and problem:
        raise UserError(f"compile: {problem}")
    if choice is None and device.type == "cuda" and problem:
        log.warning("training without torch.compile, which is slower: %s", problem)
    return device.type == "cuda" and problem is None if choice is None else choice


def compile_model(model: Captioner, threads: int) -> None:
    """Compile the layers of the decoder and of the vision tower with torch.compile.

    All layers of a kind share one graph for training and one for validation, whatever the numbers
    of images and tokens (of one image alone there is another). `threads` is how many processes
    compile side by side.
    """
    import torch._dynamo.config
    import torch._inductor.config
    import torch.fx.experimental._config

    # Sizes that are equal by chance would be taken for one: 64 images, and heads of 64 values.
    torch.fx.experimental._config.use_duck_shape = False
    # What cannot be compiled runs as it is, and torch logs why.
    torch._dynamo.config.suppress_errors = True
    # By default a process is started for each core of the machine, not of the container.
    torch._inductor.config.compile_threads = threads
    for layer in (*model.decoder.blocks, *model.vision.encoder.layers):
        layer.compile(dynamic=True)

    def require_gradient(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        # Else the first layer, whose input needs no gradient, would have a graph of its own.
        return output.requires_grad_() if torch.is_grad_enabled() else output

    model.decoder.wte.register_forward_hook(require_gradient)


class LossModule(nn.Module):
    """From pixels to summed loss and what to log, as one module for DistributedDataParallel."""

    def __init__(
        self,
        model: Captioner,
        objective: Objective,
        label_smoothing: float,
        dtype: torch.dtype,
        compiled: bool,
    ) -> None:
        super().__init__()
        self.model, self.objective = model, objective
        self.label_smoothing, self.dtype, self.compiled = label_smoothing, dtype, compiled

    def encode(self, pixels: Tensor) -> Tensor:
        """Return the visual tokens [B, S, E] of pixels, uint8 [B, 3, H, W] on any device."""
        # A frozen tower's weights have the dtype already.
        dtype = self.dtype if self.model.trains_vision else torch.float32
        with autocast(dtype, self.model.device):
            return self.model.encode(pixels.to(self.model.device, non_blocking=True))

    def forward(
        self, pixels: Tensor, numbers: list[int], step: int, rows: PackedCaptions | None
    ) -> tuple[Tensor, dict[str, float]]:
        features = self.encode(pixels)
        with autocast(self.dtype, features.device):
            targets = self.objective.make_targets(self.model, features, numbers, step, rows)
        # A new context: weights that the first one cast while sampling have no gradients.
        with autocast(self.dtype, features.device):
            hidden = states(self.model, features, targets.rows)
            weights, sums = targets.weigh() if targets.weigh else (None, {})
            loss = head_loss(
                self.model, hidden, targets.rows, self.label_smoothing, weights, self.compiled
            )
        return loss, sums


class TrainStep:
    """A model in training, with its optimizer, loss scaler and moving average.

    The processes of `world` share each batch, and have the same weights after each step. The model
    is on their device. `steps` are those of the whole run, for the learning rate.
    """

    def __init__(
        self,
        model: Captioner,
        objective: Objective,
        config: ResolvedConfig,
        world: World,
        steps: int,
    ) -> None:
        self.model, self.objective, self.config = model, objective, config
        self.world, self.device, self.steps = world, world.device, steps
        self.dtype = autocast_dtype(config.precision, self.device)
        self.scaler = loss_scaler(self.dtype, self.device)
        if self.dtype != torch.float32:
            model.freeze_into(self.dtype)
        for block in model.decoder.blocks:
            block.dropout.p = config.dropout
        if config.compile:
            compile_model(model, world.threads(0))
        model.decoder.recompute = config.recompute
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(model, config)
        self.ema = EMA(model, config.ema)
        self.loss = LossModule(
            model, objective, config.label_smoothing, self.dtype, bool(config.compile)
        )
        self.parallel_loss = world.parallel(self.loss)
        self.micro_batch_size = config.micro_batch_size
        self.skipped, self.skipped_in_a_row = torch.zeros(2, device=self.device)

    def run(
        self, batch: np.ndarray, pixels: Tensor, step: int, rows: PackedCaptions | None = None
    ) -> dict[str, Tensor | float]:
        """Take one step over a batch; return what to log, of this process alone.

        Nothing here waits for the device, in cross-entropy training.

        Args:
            batch: numbers of all its images, int [N].
            pixels: of this process's share, uint8 [B, 3, H, W].
            step: from 0.
            rows: what the objective's `pack` returned for the share; None: it is packed here.

        Raises:
            WorkError: the device has too little memory for this process's share.
        """
        share = learning_rate(step, self.steps, self.config.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * share
        rate = self.config.learning_rate * share
        while True:
            try:
                means = self._backward(batch, pixels, step, rows)
                break
            except torch.OutOfMemoryError:
                size = self.micro_batch_size or len(pixels)
            # Not above, where the exception still holds the tensors of the failed pass.
            self._halve_micro_batches(size, step)
        norm = nn.utils.get_total_norm(p.grad for p in self.trained if p.grad is not None)
        norm = norm / self.scaler.scale(torch.ones((), device=self.device))
        self._step_if_finite(norm)
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(step + 1)
        return {**means, "learning_rate": rate, "gradient_norm": norm}

    def _halve_micro_batches(self, size: int, step: int) -> None:
        failure = f"{self.device}: out of memory in step {step} with {size} images at once"
        # Several processes cannot repeat: the others wait in their backward pass.
        if size == 1 or not self.world.single_process:
            remedy = "--recompute needs less" if size == 1 else "give a smaller --micro_batch_size"
            raise WorkError(
                f"{failure}; {remedy} and start again: it goes on from its last checkpoint"
            )
        self.micro_batch_size = size // 2
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        log.warning("%s; going on with %d, gradients added up", failure, self.micro_batch_size)

    def _backward(
        self, batch: np.ndarray, pixels: Tensor, step: int, rows: PackedCaptions | None
    ) -> dict[str, Tensor | float]:
        """Compute the gradients of the batch's mean loss; return this process's part of that loss
        and of the other means."""
        seed = np.random.default_rng([self.config.seed, step, self.world.rank]).integers(2**63)
        torch.manual_seed(int(seed))
        numbers, no_rows = self.world.shard(batch).tolist(), self.world.has_no_rows(batch)
        normalizer = self.objective.normalizer(batch.tolist())
        # DistributedDataParallel averages the gradients of the processes.
        scale = 0.0 if no_rows else self.world.size / normalizer
        size = self.micro_batch_size or len(numbers)
        rows = rows if size >= len(numbers) else None
        totals: dict[str, Any] = {"train_loss": torch.zeros((), device=self.device)}
        for start in range(0, len(numbers), size):
            part = slice(start, start + size)
            with self.world.no_sync(self.parallel_loss, last=start + size >= len(numbers)):
                loss, sums = self.parallel_loss(pixels[part], numbers[part], step, rows)
                self.scaler.scale(loss * scale).backward()
            for name, value in {"train_loss": loss.detach(), **sums}.items():
                totals[name] = totals.get(name, 0.0) + value * (not no_rows)
        return {name: total / normalizer for name, total in totals.items()}

    def _step_if_finite(self, norm: Tensor) -> None:
        """Let the optimizer take a step, its gradients clipped, if all of them are finite.

        Nothing waits for the device and no pass over the gradients clips them: as for a loss
        scaler, AdamW divides them by `grad_scale`, and does nothing if `found_inf`.
        """
        bad = (~norm.isfinite()).float()
        self.skipped += bad
        self.skipped_in_a_row.add_(1).mul_(bad)
        if self.device.type == "mps":  # its AdamW reads no `grad_scale`
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grads_with_norm_(self.trained, self.config.clip_norm, norm)
        else:
            # As `clip_grad_norm_` has it. An enabled scaler multiplies it with its own scale.
            excess = ((norm + 1e-6) / self.config.clip_norm).clamp(min=1)
            self.optimizer.grad_scale = excess  # type: ignore[attr-defined]
        if not self.scaler.is_enabled():
            self.optimizer.found_inf = bad  # type: ignore[attr-defined]
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def require_progress(self) -> int:
        """Return the number of steps skipped so far; `WorkError` if the last 25 all were."""
        if self.skipped_in_a_row >= MAX_SKIPPED:
            raise WorkError(
                f"{self.config.name}: the gradients of the last {int(self.skipped_in_a_row)} "
                "steps are not finite; no weight was changed by them, and the last checkpoint is "
                f"whole; lower the learning rate ({self.config.learning_rate}) or train in float32"
            )
        return int(self.skipped)

    def snapshot(self) -> dict[str, Tensor]:
        """Return copies on the CPU of all tensors that training goes on from."""
        tensors = {f"average.{name}": average for name, average in self.ema.averages.items()}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                tensors[f"model.{name}"] = parameter
                for moment, value in self.optimizer.state[parameter].items():
                    tensors[f"optimizer.{moment}.{name}"] = value
        return {
            name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in tensors.items()
        }

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from the tensors of a `snapshot`."""
        parameters = dict(self.model.named_parameters())
        for key, tensor in tensors.items():
            kind, _, name = key.partition(".")
            if kind == "model":
                parameters[name].copy_(tensor)
            elif kind == "average":
                self.ema.averages[name].copy_(tensor)
            else:
                moment, _, name = name.partition(".")
                state = self.optimizer.state[parameters[name]]
                state[moment] = tensor.to(self.device, copy=True)
