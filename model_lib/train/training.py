"""Training one candidate, from the data set's manifest to the best model.

`train` builds the tokenizer and model, and a `Trainer` with the data and the optimizer. The trainer
resumes from the newest whole checkpoint, takes steps, and at each validation measures loss and
CIDEr, keeps the model if it is the best so far, and writes a checkpoint. Its position is a count of
steps; the order of the data, the views of the images, the learning rate and all random numbers
follow from it.

Several processes (`distributed.World`) do the same together: each learns its share of every batch,
and the main one logs and writes. What depends on time or chance is agreed on in each step, so that
none waits for another that has stopped.
"""

import logging
import math
import signal
import uuid
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from model_lib.data.shards import Manifest, read_manifest, verify
from model_lib.errors import UserError, WorkError
from model_lib.exits import StopRequest, catch_signals
from model_lib.io import storage
from model_lib.io.locks import output_lock
from model_lib.io.validation import read_record
from model_lib.model.captioner import Captioner
from model_lib.presets import stored_side
from model_lib.progress import Progress
from model_lib.tracking.runs import NO_TRACKING, Run, Tracking
from model_lib.train import checkpoint
from model_lib.train.build import build_model, identity
from model_lib.train.config import ResolvedConfig, TrainConfig, Trained, pin_sources, resolve
from model_lib.train.data import TrainData
from model_lib.train.distributed import World, join_world, started_by_launcher
from model_lib.train.flops import peak_flops, useful_flops
from model_lib.train.loss import CrossEntropyObjective, Objective
from model_lib.train.metrics import MetricLogger
from model_lib.train.saving import Saver
from model_lib.train.self_critical import SelfCriticalObjective
from model_lib.train.step import TrainStep, should_compile
from model_lib.train.validation import ValidationScore, Validator

log = logging.getLogger(__name__)


def train(config: TrainConfig, tracking: Tracking = NO_TRACKING) -> Trained:
    """Train one candidate, or finish what an earlier call with the same options began.

    SIGTERM makes it write a checkpoint and exit with 143; among several processes, so does SIGINT,
    with 130.

    Raises:
        UserError: data, weights or output cannot be used, or the output holds a run with other
            options.
        WorkError: the work failed; started again, it goes on from the last checkpoint.
    """
    signals = [signal.SIGTERM, signal.SIGINT] if started_by_launcher() else [signal.SIGTERM]
    with (
        join_world(config.device) as world,
        catch_signals(*signals) as stop_request,
        ExitStack() as stack,
    ):
        world.run_on_main(tracking.require_answer)
        world.run_on_main(lambda: stack.enter_context(output_lock(config.output)))
        return Trainer(config, world, tracking, stop_request).run()


def _warn_of_small_images(manifest: Manifest, size: int) -> None:
    stored = manifest.configuration.get("shortest_side", size)
    if manifest.configuration.get("store") == "reduced" and stored < size:
        log.warning(
            "%s: larger images were reduced to %d pixels, and the vision tower takes %d; "
            "ingest anew with --shortest_side %d",
            manifest.uri,
            stored,
            size,
            stored_side(size),
        )


def _prepare(config: TrainConfig, world: World) -> tuple[ResolvedConfig, Manifest, Captioner]:
    """Return the resolved configuration, the verified data set, and the model on its device."""
    compiled = should_compile(config.compile, world.device)
    resolved = replace(pin_sources(resolve(config)), compile=compiled)
    manifest, splits = read_manifest(config.data), ("train", "val")
    for split in splits:
        manifest.require_split(split)
    shards = [shard for shard in manifest.shards if shard.split in splits]
    verify(world.share(shards), config.name, world.threads(config.workers), world.is_main)
    model = build_model(resolved, manifest).to(world.device)
    if world.is_main:
        _warn_of_small_images(manifest, model.image_size)
    return resolved, manifest, model


class _Stopped(Exception):
    """A signal asked the process to stop."""


@dataclass(frozen=True)
class RunRecord:
    """The content of `run.json`, which is written before anything else."""

    key: str
    """By which MLflow's run is found again."""
    origin: str
    """Key of the configuration and data that the run was made from."""
    configuration: dict[str, Any]


class Trainer:
    """One training run, in this process of `world`."""

    def __init__(
        self, config: TrainConfig, world: World, tracking: Tracking, stop_request: StopRequest
    ) -> None:
        self.world, self.tracking, self.stop_request = world, tracking, stop_request
        resolved, manifest, model = world.run_on_all(lambda: _prepare(config, world))
        self.config, self.manifest, self.model = resolved, manifest, model
        self.data = TrainData(resolved, manifest, model, world)
        self.steps = self.data.epoch_steps * resolved.epochs
        objective: Objective
        self.reward: dict[str, Any] = {}
        if resolved.objective == "self-critical":
            objective = SelfCriticalObjective(self.data.captions, resolved)
            self.reward = {f"reward_{name}": v for name, v in objective.describe().items()}
        else:
            objective = CrossEntropyObjective(self.data.ids, model.start_token)
        self.train_step = TrainStep(model, objective, resolved, world, self.steps)
        self.validator = Validator(resolved, manifest, model.preprocess, world)
        self.saver = Saver(resolved, self.train_step)
        self.tracked = Run()
        self.step, self.validated, self.stale = 0, 0, 0
        self.best: ValidationScore | None = None

    @property
    def validation_due(self) -> bool:
        every = self.config.validate_every or self.data.epoch_steps
        return self.step > self.validated and (self.step % every == 0 or self.step == self.steps)

    @property
    def finished(self) -> bool:
        stopped_early = self.config.patience > 0 and self.stale >= self.config.patience
        return (self.step == self.steps or stopped_early) and not self.validation_due

    def run(self) -> Trained:
        """Train from the newest checkpoint to the end."""
        config, is_main = self.config, self.world.is_main
        record = self.world.run_on_main(self._run_record)
        self._resume()
        self.world.run_on_main(self.saver.require_room)
        if is_main:
            self.tracked = self._start_run(record.key)
        progress = Progress(f"train {config.name}", self.steps, "steps", self.step, shown=is_main)
        # What drawing captions computes is not counted.
        peak = None if self.reward else peak_flops(self.world.device, self.train_step.dtype)
        metrics = MetricLogger(self.tracked, progress, self.world, peak)
        with self.tracked, progress, self.saver, self.stop_request.defer_stop():
            try:
                while not self.finished:
                    if self.validation_due:
                        self._validate()
                    else:
                        self._train_epoch(metrics)
            except _Stopped:
                self._stop()
        assert self.best is not None
        return Trained(
            model=self.saver.best_uri,
            validation_loss=-self.best.negative_loss,
            validation_cider=self.best.cider,
            steps=self.step,
            run_id=self.tracked.run_id,
        )

    def _start_run(self, key: str) -> Run:
        config, manifest = self.config, self.manifest
        if self.reward:
            log.warning("reward: %s", ", ".join(f"{k} {value}" for k, value in self.reward.items()))
        counts = ", ".join(f"{split} {count}" for split, count in manifest.counts.items())
        tags = {
            "captioner.data_fingerprint": manifest.fingerprint,
            "captioner.data_counts": counts,
        }
        params = {**config.to_dict(), **self.reward}
        return self.tracking.start(
            config.name,
            key,
            params,
            tags,
            folder=config.output,
            step=self.step,
            data=manifest.as_input(config.data, "train", "training"),
            model=self.saver.best_uri,
        )

    def _train_epoch(self, metrics: MetricLogger) -> None:
        """Take steps to the next validation or the epoch's end."""
        self.model.train()
        metrics.restart()
        is_main = self.world.is_main
        with closing(self.data.batches(self.step, self.train_step.objective.pack)) as batches:
            for batch, pixels, rows in batches:
                self.saver.check()
                self.world.wait_for_all()  # a store may be slow for longer than a GPU waits
                measured = self.train_step.run(batch, pixels, self.step, rows)
                self.step += 1
                tokens = int(self.data.lengths[batch].sum())
                flops = useful_flops(self.model.config, len(batch), tokens)
                metrics.count_step(len(batch), flops)
                log_due, save_due, stopped = self.world.any(
                    is_main and metrics.late(),
                    is_main and self.saver.due(self.step),
                    self.stop_request.signal > 0,
                )
                if log_due or self.step % self.config.log_steps == 0 or self.step == self.steps:
                    skipped = self.world.run_on_all(self.train_step.require_progress)
                    metrics.log(measured, self.step, skipped)
                if stopped:
                    raise _Stopped
                if save_due:
                    self._checkpoint()
                if self.validation_due:
                    return

    def _validate(self) -> None:
        """Evaluate the model, keep it if it is the best so far, and write a checkpoint."""
        weights = None
        with self.train_step.ema.applied():
            scores = self.validator.measure(self.train_step, self._stop_if_alone)
            self.tracked.log(scores, self.step)
            loss, cider = scores["val_loss"], scores["val_slice_CIDEr"]
            self.world.run_on_all(lambda: self._require_finite(loss))
            score = ValidationScore(cider, -loss)
            self.stale += 1
            if self.best is None or score > self.best:
                self.best, self.stale = score, 0
                weights = self.saver.copy_weights() if self.world.is_main else None
        self.validated = self.step
        about = {
            "name": self.config.name,
            "step": self.step,
            "validation_loss": loss,
            "validation_cider": cider,
            "mlflow_run_id": self.tracked.run_id,
            "data_fingerprint": self.manifest.fingerprint,
            "configuration": self.config.to_dict(),
        }
        self._checkpoint(None if weights is None else (weights, about))

    def _require_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise WorkError(
                f"{self.config.name}: the validation loss is {loss} after step {self.step}; the "
                "best model so far is kept; lower the learning rate "
                f"({self.config.learning_rate}) or train in float32"
            )

    def _stop_if_alone(self) -> None:
        """Leave a validation when a signal has come; other processes would wait for this one."""
        if self.world.single_process and self.stop_request.signal > 0:
            raise _Stopped

    def _checkpoint(self, best: tuple[dict[str, Tensor], Any] | None = None) -> None:
        if not self.world.is_main:
            return
        self.tracked.flush()  # points before a checkpoint are not logged again
        position = checkpoint.Position(
            step=self.step,
            validated=self.validated,
            stale=self.stale,
            best=self.best,
            skipped=int(self.train_step.skipped),
            scaler=self.train_step.scaler.state_dict(),
            configuration=self.config.to_dict(),
        )
        self.saver.save(position, best)

    def _stop(self) -> None:
        """Write a checkpoint and exit with the signal's code."""
        if self.saver.step != self.step:
            self._checkpoint()
        # A launcher ends the main process as soon as another one has ended.
        self.world.run_on_all(self.saver.wait)
        number = max(self.world.gather(self.stop_request.signal))
        if self.world.is_main:
            message = "%s: stopped by %s after step %d; the same command goes on"
            log.warning(message, self.config.name, signal.Signals(number).name, self.step)
        raise SystemExit(128 + number)

    def _resume(self) -> None:
        """Go on from the newest whole checkpoint, if there is one."""
        uri = self.world.run_on_main(self.saver.checkpoints.newest)
        if uri is None:
            return
        tensors, position = self.world.run_on_all(lambda: checkpoint.load(uri))
        self.train_step.restore(tensors)
        self.train_step.skipped.fill_(position.skipped)
        self.train_step.scaler.load_state_dict(position.scaler)
        self.step = self.saver.step = position.step
        self.validated, self.stale, self.best = position.validated, position.stale, position.best
        if self.world.is_main:
            log.warning("resuming %s at step %d of %d", self.config.name, self.step, self.steps)

    def _run_record(self) -> RunRecord:
        """Return the content of `run.json`, written if there is none.

        Raises:
            UserError: the output holds a run with other options or data.
        """
        config, version = self.config, str(checkpoint.FORMAT_VERSION)
        start = [] if config.init_from is None else [identity(self.model)]
        origin = config.key(self.manifest.fingerprint, version, *start)
        file = storage.join(config.output, "run.json")
        if not storage.exists(file):
            record = RunRecord(uuid.uuid4().hex, origin, config.to_dict())
            storage.write_json(file, vars(record))
            return record
        record = read_record(file, RunRecord, "what captioner train wrote; choose another output")
        if record.origin != origin:
            self._refuse_other_run(record.configuration)
        return record

    def _refuse_other_run(self, configuration: dict[str, Any]) -> None:
        """Raise `UserError` that names the first option in which the run in the output differs."""
        options = self.config.shaping().items()
        changed = [
            f"{n} {configuration.get(n)}, not {v}" for n, v in options if configuration.get(n) != v
        ]
        problem = f"with {changed[0]}" if changed else "on other data or from other weights"
        remedy = "choose another output"
        if storage.exists(self.saver.best_uri):
            remedy += f", with --init_from {self.saver.best_uri} to go on from its model"
        raise UserError(f"{self.config.output}: holds a run {problem}; {remedy}")
