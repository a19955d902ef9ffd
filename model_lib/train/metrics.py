"""The metrics of training steps, for MLflow and the progress line."""

import time

from torch import Tensor

from model_lib.progress import INTERVAL, Progress
from model_lib.tracking.runs import Run
from model_lib.train.distributed import World


class MetricLogger:
    """Logs the loss, the rates and the speed since it logged last; in self-critical training, the
    reward."""

    def __init__(self, run: Run, progress: Progress, world: World, self_critical: bool) -> None:
        self.run, self.progress, self.world = run, progress, world
        self.self_critical = self_critical
        self.restart()

    def restart(self) -> None:
        """Measure the speed from now on."""
        self.time, self.images = time.monotonic(), 0

    def late(self) -> bool:
        """Return whether the last metrics are several seconds old."""
        return time.monotonic() - self.time > INTERVAL

    def count_step(self, images: int) -> None:
        self.images += images
        self.progress.advance()

    def log(self, measured: dict[str, Tensor | float], step: int, skipped: int) -> None:
        """Log what `TrainStep.run` returned in each process."""
        parts = self.world.gather((float(measured["train_loss"]), float(measured["reward"])))
        loss, reward = map(sum, zip(*parts, strict=True))
        speed = self.images / max(time.monotonic() - self.time, 1e-9)
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
        if skipped:
            note += f", {skipped} steps skipped: gradients not finite"
        self.run.log(metrics, step)
        self.progress.advance(0, note)
        self.restart()
