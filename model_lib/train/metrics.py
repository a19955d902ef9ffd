"""The metrics of training steps, for MLflow and the progress line."""

import time

from torch import Tensor

from model_lib.progress import INTERVAL, Progress
from model_lib.tracking.runs import Run
from model_lib.train.distributed import World


class MetricLogger:
    """Logs the loss, the rates and the speed since it logged last; in self-critical training, what
    was drawn too.

    `peak` is the FLOP/s that the device of a process can reach; None: the share of it that is used
    (MFU) is not logged.
    """

    def __init__(
        self,
        run: Run,
        progress: Progress,
        world: World,
        peak: float | None = None,
    ) -> None:
        self.run, self.progress, self.world = run, progress, world
        self.peak = peak
        self.restart()

    def restart(self) -> None:
        """Measure the speed from now on."""
        self.time, self.images, self.flops = time.monotonic(), 0, 0.0

    def late(self) -> bool:
        """Return whether the last metrics are several seconds old."""
        return time.monotonic() - self.time > INTERVAL

    def count_step(self, images: int, flops: float) -> None:
        """Count a step over so many images, with so many useful operations in all processes."""
        self.images += images
        self.flops += flops
        self.progress.advance()

    def log(self, measured: dict[str, Tensor | float], step: int, skipped: int) -> None:
        """Log what `TrainStep.run` returned in each process."""
        own = {name: float(value) for name, value in measured.items()}
        rates = {name: own.pop(name) for name in ("learning_rate", "gradient_norm")}
        parts = self.world.gather(own)
        means = {name: sum(part[name] for part in parts) for name in own}
        seconds = max(time.monotonic() - self.time, 1e-9)
        speed = self.images / seconds
        metrics = {**means, **rates, "images_per_second": speed, "skipped_steps": skipped}
        name = "reward" if "reward" in means else "train_loss"
        note = f"{name} {means[name]:.3f}, {speed:,.1f} images per second"
        if self.peak is not None:
            metrics["mfu"] = self.flops / seconds / (self.peak * self.world.size)
            note += f", {metrics['mfu']:.0%} MFU"
        if skipped:
            note += f", {skipped} steps skipped: gradients not finite"
        self.run.log(metrics, step)
        self.progress.advance(0, note)
        self.restart()
