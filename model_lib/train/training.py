"""Training one candidate, from the data set's manifest to the best model.

The story of a run: build the model and its tokenizer, resume from the newest whole checkpoint if
there is one, pass over the images, and at each validation measure loss and CIDEr, keep the model if
it is the best so far, and write a checkpoint. Where it stands is a count of steps, from which the
order of the data, the views of the images, the learning rate and all random numbers follow.

Several processes tell the same story together (`distributed.World`): each learns its share of every
batch, and the first one of them logs and writes. Whatever depends on time or chance is decided
together, so that none waits in vain.
"""

import logging
import math
import signal
import tempfile
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model_lib.data.shards import (
    BatchOrder,
    Manifest,
    SplitReader,
    read_manifest,
    verify,
)
from model_lib.errors import UserError, WorkError
from model_lib.exits import StopRequest, catch_signals
from model_lib.io import storage
from model_lib.io.background import Background
from model_lib.io.errors import input_errors
from model_lib.io.locks import output_lock
from model_lib.model.captioner import Captioner
from model_lib.model.sources import lasting_source
from model_lib.model.tokens import encode_captions
from model_lib.progress import INTERVAL, Progress
from model_lib.tracking.runs import Point
from model_lib.tracking.server import NO_TRACKING, Run, Tracking
from model_lib.train import checkpoint
from model_lib.train.augmentation import augmented
from model_lib.train.build import build_model, identity
from model_lib.train.checkpoint import Checkpoints
from model_lib.train.config import TrainConfig, Trained
from model_lib.train.distributed import World, join_world, shared, started_by_launcher
from model_lib.train.learning import Learner, require_compiler
from model_lib.train.objectives import CrossEntropyObjective, Objective, SelfCriticalObjective
from model_lib.train.validation import ValidationScore, Validator

log = logging.getLogger(__name__)


def train(config: TrainConfig, tracking: Tracking = NO_TRACKING) -> Trained:
    """Train one candidate, or finish what an earlier call with the same options began.

    One of several processes if torchrun started it as such. SIGTERM makes it write a checkpoint and
    exit with 143, and among several processes so does SIGINT, with 130.

    Raises:
        UserError: data, weights or output cannot be used, or the output holds a run with other
            options.
        WorkError: the work failed; started again, it goes on from the last checkpoint.
    """
    several = [signal.SIGINT] if started_by_launcher() else []
    with (
        join_world(config.device) as world,
        catch_signals(signal.SIGTERM, *several) as asked,
        ExitStack() as alone,
    ):
        world.run_on_main(tracking.require_answer)
        world.run_on_main(lambda: alone.enter_context(output_lock(config.output)))
        config, manifest, model = world.run_on_all(lambda: _data_and_model(config, world))
        return Trainer(
            config, manifest, model, world, tracking if world.is_main else NO_TRACKING, asked
        ).run()


def _data_and_model(config: TrainConfig, world: World) -> tuple[TrainConfig, Manifest, Captioner]:
    """Return the configuration with a lasting start, the checked data set, and the untrained model
    on its device."""
    if config.init_from is not None:
        config = replace(config, init_from=lasting_source(config.init_from))
    if config.compile:
        require_compiler(world.device)
    manifest, splits = read_manifest(config.data), ("train", "val")
    for split in splits:
        manifest.require_split(split)
    verify(
        shared([s for s in manifest.shards if s.split in splits], world),
        config.name,
        config.workers,
        world.is_main,
    )
    return config, manifest, build_model(config, manifest).to(world.device)


class _Stopped(Exception):
    """The process was asked to stop."""


class Trainer:
    """The state of one training run."""

    def __init__(
        self,
        config: TrainConfig,
        manifest: Manifest,
        model: Captioner,
        world: World,
        tracking: Tracking,
        asked: StopRequest,
    ) -> None:
        self.config, self.manifest, self.model, self.world, self.tracking = (
            config,
            manifest,
            model,
            world,
            tracking,
        )
        self.stop_request = asked
        self.train_data = SplitReader(
            manifest, "train", size=model.image_size, workers=config.workers
        )
        self.texts = self.train_data.captions()
        ids = encode_captions(
            model.tokenizer, self.texts, config.captions_per_image, config.max_tokens
        )
        self.lengths = np.array([sum(map(len, image)) for image in ids])
        objective: Objective = CrossEntropyObjective(ids, model.tokenizer.eos_token_id)
        self.reward: dict[str, Any] = {}
        if config.objective == "self-critical":
            objective = critic = SelfCriticalObjective(self.texts, config)
            self.reward = {f"reward_{name}": value for name, value in critic.describe().items()}
        self.epoch_steps = -(-self.train_data.rows // config.batch_size)
        self.steps = self.epoch_steps * config.epochs
        start = [] if config.init_from is None else [identity(model)]
        self.origin = config.key(manifest.fingerprint, str(checkpoint.FORMAT_VERSION), *start)
        self.learner = Learner(model, objective, config, world, self.steps)
        self.validator = Validator(config, manifest, model.image_size, world)
        self.checkpoints = Checkpoints(config.output, config.checkpoints_kept)
        self.saving = Background()
        self.step, self.validated, self.stale = 0, 0, 0
        self.best: ValidationScore | None = None
        self.unsent: list[Point] = []
        self.saved, self.saved_at, self.logged_at, self.images = (
            0,
            time.monotonic(),
            time.monotonic(),
            0,
        )

    @property
    def best_uri(self) -> str:
        return storage.join(self.config.output, "best")

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        stopped = self.config.patience > 0 and self.stale >= self.config.patience
        return (self.step == self.steps or stopped) and not self._due

    @property
    def _due(self) -> bool:
        """Whether a validation is due; it is left to the resumed run if a kill comes between."""
        every = self.config.validate_every or self.epoch_steps
        return self.step > self.validated and (self.step % every == 0 or self.step == self.steps)

    def run(self) -> Trained:
        self._resume()
        if self.reward and self.world.is_main:
            log.warning(
                "reward: %s", ", ".join(f"{name} {value}" for name, value in self.reward.items())
            )
        self.world.run_on_main(lambda: checkpoint.require_room(self.config, self.model))
        key = self.world.run_on_main(self._key)
        run = self.tracking.start(
            self.config.name, key, {**self.config.to_dict(), **self.reward}, self._tags()
        )
        run.resume(self.unsent)
        steps = Progress(
            f"train {self.config.name}", self.steps, "steps", self.step, shown=self.world.is_main
        )
        with run, steps as progress, self.saving, self.stop_request.defer_stop():
            try:
                while not self.finished:
                    if self._due:
                        self._validate(run)
                    else:
                        self._epoch(run, progress)
            except _Stopped:
                self._stop(run)
        assert self.best is not None
        return Trained(
            self.best_uri, -self.best.negative_loss, self.best.cider, self.step, run.run_id
        )

    def _tags(self) -> dict[str, str]:
        counts = ", ".join(f"{split} {count}" for split, count in self.manifest.counts.items())
        return {
            "captioner.data_fingerprint": self.manifest.fingerprint,
            "captioner.data_counts": counts,
        }

    # ---- learning --------------------------------------------------------------------------------

    def _epoch(self, run: Run, progress: Progress) -> None:
        """Train to the next validation or the epoch's end, from wherever in it the run stands."""
        epoch, skip = divmod(self.step, self.epoch_steps)
        self.model.train()
        config = self.config
        order = self.train_data.shuffled(
            config.batch_size, config.seed, epoch, self.lengths, config.sort_batches
        )
        rest = order[skip:]
        self.logged_at, self.images = time.monotonic(), 0
        with closing(self._pixels([self.world.shard(batch) for batch in rest], epoch)) as shards:
            for batch, pixels in zip(rest, shards, strict=True):
                self.saving.check()
                measured = self.learner.learn(batch, pixels, self.step)
                self.step += 1
                self.images += len(batch)
                progress.advance()
                logs, saves, stops = self.world.any(
                    self.world.is_main and time.monotonic() - self.logged_at > INTERVAL,
                    self.world.is_main and self._checkpoint_due(),
                    self.stop_request.signal > 0,
                )
                if logs or self.step % config.log_steps == 0 or self.step == self.steps:
                    self._log(run, progress, measured)
                if stops:
                    raise _Stopped
                if saves:
                    self._checkpoint(run)
                if self._due:
                    return

    def _pixels(self, order: BatchOrder, epoch: int) -> Generator[Tensor]:
        """Yield the pixels of each batch's images, uint8 [B, 3, size, size]."""

        def view(image: Image.Image, number: int) -> np.ndarray:
            rng = np.random.default_rng([self.config.seed, epoch, number])
            return augmented(image, self.model.image_size, self.texts[number], rng)

        augment = self.config.augment == "yes"
        with closing(self.train_data.pixels(order, view if augment else None)) as batches:
            for pixels in map(torch.from_numpy, batches):
                yield pixels.pin_memory() if self.world.device.type == "cuda" else pixels

    def _log(self, run: Run, progress: Progress, measured: dict[str, Tensor | float]) -> None:
        parts = torch.tensor(
            [float(measured[name]) for name in ("train_loss", "reward")], device=self.world.device
        )
        loss, reward = self.world.sum(parts).tolist()
        skipped, now = self._skipped(), time.monotonic()
        speed = self.images / max(now - self.logged_at, 1e-9)
        values = {name: float(measured[name]) for name in ("learning_rate", "gradient_norm")}
        values |= {"train_loss": loss, "images_per_second": speed, "skipped_steps": skipped}
        if self.reward:
            values["reward"] = reward
        run.log(values, self.step)
        shown = f"reward {reward:.3f}" if self.reward else f"train_loss {loss:.3f}"
        left_out = f", {skipped} steps skipped: gradients not finite" if skipped else ""
        progress.advance(0, f"{shown}, {speed:,.1f} images per second{left_out}")
        self.logged_at, self.images = now, 0

    def _skipped(self) -> int:
        """Return how many steps were left out; the run ends if it gets nowhere."""
        try:
            return self.learner.require_progress(self.step)
        except WorkError as error:
            raise self.world.once(error) from None

    # ---- evaluating ------------------------------------------------------------------------------

    def _validate(self, run: Run) -> None:
        """Evaluate the model, keep it if it is the best so far, and write a checkpoint."""

        def encode(pixels: Tensor) -> Tensor:
            if (
                self.world.single_process and self.stop_request.signal > 0
            ):  # the others would wait for this process
                raise _Stopped
            return self.learner.loss.encode(pixels)

        with self.learner.average.applied():
            at_once = self.learner.micro_batch_size or -(-self.config.batch_size // self.world.size)
            scores = self.validator.measure(self.model, encode, self.learner.dtype, at_once)
            run.log(scores, self.step)
            loss = scores["val_loss"]
            if not math.isfinite(loss):
                raise self.world.once(
                    WorkError(
                        f"{self.config.name}: the validation loss is {loss} after step "
                        f"{self.step}; the best model so "
                        f"far is kept; lower the learning rate ({self.config.learning_rate}) or "
                        "train in float32"
                    )
                )
            standing = ValidationScore(scores["val_slice_CIDEr"], -loss)
            self.stale += 1
            keep = self.best is None or standing > self.best
            if keep:
                self.best, self.stale = standing, 0
            self.saving.wait()  # before there is a second copy in memory
            weights = self._weights() if keep and self.world.is_main else None
        self.validated = self.step
        self._checkpoint(
            run, None if weights is None else lambda: self._save_best(weights, scores, run.run_id)
        )

    def _weights(self) -> dict[str, Tensor]:
        """Return copies of all the model's weights, float32 on the CPU."""
        state = self.model.state_dict()
        return {
            name: tensor.detach().to("cpu", torch.float32, copy=True)
            for name, tensor in state.items()
        }

    def _save_best(
        self, weights: dict[str, Tensor], scores: dict[str, float], run_id: str | None
    ) -> None:
        about = {
            "name": self.config.name,
            "step": self.validated,
            "validation_loss": scores["val_loss"],
            "validation_cider": scores["val_slice_CIDEr"],
            "mlflow_run_id": run_id,
            "data_fingerprint": self.manifest.fingerprint,
            "configuration": self.config.to_dict(),
        }
        try:
            with tempfile.TemporaryDirectory() as scratch:
                self.model.save_pretrained(scratch, state_dict=weights)
                storage.upload_folder(scratch, self.best_uri)
            storage.write_json(storage.join(self.best_uri, "training.json"), about)
        except Exception as error:
            raise checkpoint.unwritten(self.best_uri, error) from error

    # ---- surviving -------------------------------------------------------------------------------

    def _checkpoint_due(self) -> bool:
        """Return whether it is time for a checkpoint; not while the last one is being written."""
        minutes, steps = self.config.checkpoint_minutes, self.config.checkpoint_steps
        late = time.monotonic() - self.saved_at > 60 * minutes and not self.saving.busy
        return late or (steps > 0 and self.step - self.saved >= steps)

    def _checkpoint(self, run: Run, first: Callable[[], None] | None = None) -> None:
        """Write a checkpoint while training goes on, after the work that comes `first`."""
        if not self.world.is_main:
            return
        position = checkpoint.Position(
            step=self.step,
            validated=self.validated,
            stale=self.stale,
            best=None if self.best is None else [self.best.cider, self.best.negative_loss],
            origin=self.origin,
            learner=self.learner.state(),
            unsent=run.unsent(),  # what this checkpoint goes on from is not logged again
            configuration=self.config.to_dict(),
        )
        self.saving.wait()  # before there is a second copy in memory, here too
        tensors = checkpoint.snapshot(
            self.model, self.learner.optimizer, self.learner.average.state()
        )
        name = f"step-{self.step:08d}" + ("-validated" if self.validated == self.step else "")

        def write() -> None:
            if first is not None:
                first()
            self.checkpoints.write(name, tensors, position)

        self.saving.start(write)
        self.saved, self.saved_at = self.step, time.monotonic()

    def _stop(self, run: Run) -> None:
        """Write a checkpoint and end the process as its signal asks."""
        if self.saved != self.step:
            self._checkpoint(run)
        self.world.run_on_all(
            self.saving.wait
        )  # a launcher ends the first process when another has ended
        number = max(self.world.gather(self.stop_request.signal))
        if self.world.is_main:
            name = signal.Signals(number).name
            log.warning(
                "%s: stopped by %s after step %d; the same command goes on",
                self.config.name,
                name,
                self.step,
            )
        raise SystemExit(128 + number)

    def _resume(self) -> None:
        uri = self.world.run_on_main(self.checkpoints.newest)
        if uri is not None:
            self.world.run_on_all(lambda: self._restore(uri))

    def _restore(self, uri: str) -> None:
        tensors, position = checkpoint.load(uri)
        with checkpoint.restoring(uri):
            self._require_same(position.origin)
            self.learner.restore(
                checkpoint.restore(tensors, self.model, self.learner.optimizer), position.learner
            )
            self.step, self.validated, self.stale = (
                position.step,
                position.validated,
                position.stale,
            )
            self.best = (
                None if position.best is None else ValidationScore(*map(float, position.best))
            )
            self.unsent = [
                (str(name), float(value), int(at), int(step))
                for name, value, at, step in position.unsent
            ]
        self.saved = self.step
        if self.world.is_main:
            log.warning("resuming %s at step %d of %d", self.config.name, self.step, self.steps)

    def _require_same(self, origin: str) -> None:
        if origin != self.origin:
            raise UserError(
                f"{self.config.output}: holds a run with other options or data; choose another "
                "output or delete it"
            )

    def _key(self) -> str:
        """Return what the run is known by in MLflow: written before anything else, so that it
        outlasts every kill."""
        file = storage.join(self.config.output, "run.json")
        if storage.exists(file):
            document = storage.read_json(file)
            with input_errors(file, "what captioner train wrote; choose another output"):
                self._require_same(document["origin"])
                return str(document["key"])
        key = uuid.uuid4().hex
        storage.write_json(file, {"key": key, "origin": self.origin, "name": self.config.name})
        return key
