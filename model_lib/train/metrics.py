"""The metrics of training steps, for MLflow and the progress line."""

import time

from torch import Tensor

from model_lib.progress import INTERVAL, Progress
from model_lib.tracking.runs import Run
from model_lib.train.distributed import World


class MetricLogger:
    """Logs the loss, the rates and the speed since it logged last; in self-critical training, the
    reward.

    `peak` is the FLOP/s that the device of a process can reach; None: the share of it that is used
    (MFU) is not logged.
    """

    def __init__(
        self,
        run: Run,
        progress: Progress,
        world: World,
        self_critical: bool = False,
        peak: float | None = None,
    ) -> None:
        self.run, self.progress, self.world = run, progress, world
        self.self_critical, self.peak = self_critical, peak
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
        parts = self.world.gather((float(measured["train_loss"]), float(measured["reward"])))
        loss, reward = map(sum, zip(*parts, strict=True))
        seconds = max(time.monotonic() - self.time, 1e-9)
        speed = self.images / seconds
        metrics = {
            "train_loss": loss,
            "learning_rate": float(measured["learning_rate"]),
            "gradient_norm": float(measured["gradient_norm"]),
            "images_per_second": speed,
            "skipped_steps": skipped,
        }
        note = f"train_loss {loss:.3f}"
        if self.self_critical:
            metrics["reward"] = reward
            note = f"reward {reward:.3f}"
        note += f", {speed:,.1f} images per second"
        if self.peak is not None:
            metrics["mfu"] = self.flops / seconds / (self.peak * self.world.size)
            note += f", {metrics['mfu']:.0%} MFU"
        if skipped:
            note += f", {skipped} steps skipped: gradients not finite"
        self.run.log(metrics, step)
        self.progress.advance(0, note)
        self.restart()
