"""Training one candidate, from the data set's manifest to the best model.

The story of a run: build the model and its tokenizer, resume from the newest whole checkpoint if there is one, pass
over the pictures, and after each epoch measure the validation loss, keep the model if it is the best so far, and
write a checkpoint. Where it stands is a count of steps, from which the order of the data and the learning rate follow.
"""

import logging
import math
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from model_lib import checkpoint, storage
from model_lib.config import TrainConfig
from model_lib.errors import UserError, WorkError
from model_lib.loss import caption_loss
from model_lib.model import Captioner
from model_lib.precision import autocast, autocast_dtype, choose_device, loss_scaler
from model_lib.presets import PRESETS
from model_lib.progress import Progress
from model_lib.shards import Batch, Manifest, SplitReader, read_manifest
from model_lib.tokens import encode_captions, train_tokenizer
from model_lib.tracking import NO_TRACKING, Tracking

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """What a finished run leaves behind."""

    model: str
    """Folder or URI of the best model, self-contained."""
    validation_loss: float
    """Its mean cross-entropy in nats a token, on as many captions a validation picture as it learns from."""
    steps: int
    run_id: str | None
    """The MLflow run."""


def train(config: TrainConfig, tracking: Tracking = NO_TRACKING) -> Trained:
    """Train one candidate, or finish what an earlier call with the same options began.

    Raises:
        UserError: data, weights or output cannot be used, or the output holds a run with other options.
    """
    manifest = read_manifest(config.data)
    for split in ("train", "val"):
        manifest.require_split(split)
    storage.require_writable(config.output)
    torch.manual_seed(config.seed)
    device = choose_device(config.device)
    model = build_model(config, manifest).to(device)
    return _Run(config, manifest, model, device, tracking).to_the_end()


def build_model(config: TrainConfig, manifest: Manifest) -> Captioner:
    """Return the untrained captioner of the preset: from pretrained parts, or from scratch with its own tokenizer."""
    preset = PRESETS[config.preset]
    if preset.vision is not None and preset.decoder is not None:
        return Captioner.from_parts(config.vision or preset.vision, config.decoder or preset.decoder, config.tokenizer)
    captions = SplitReader(manifest, "train", batch_size=1, size=1).captions()
    tokenizer = train_tokenizer(captions, preset.decoder_shape["vocab_size"])
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = Captioner(preset.config(vocab_size=len(tokenizer), **ends))
    model.tokenizer = tokenizer
    return model


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Return the rate of `step` (from 0): a linear rise over the share `warmup` of `steps`, then half a cosine."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def make_optimizer(model: nn.Module, config: TrainConfig, device: torch.device) -> torch.optim.AdamW:
    """Return AdamW over the trained weights; norms and biases do not decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.99), fused=device.type in ("cpu", "cuda"))


class _Run:
    """The state of one training run."""

    def __init__(
        self, config: TrainConfig, manifest: Manifest, model: Captioner, device: torch.device, tracking: Tracking
    ) -> None:
        self.config, self.manifest, self.model, self.device = config, manifest, model, device
        positions = model.config.decoder_config.n_positions
        if config.max_tokens > positions:
            raise UserError(f"max_tokens: {config.max_tokens} is more than the model's {positions} positions")
        reading = {"batch_size": config.batch_size, "size": model.image_size, "workers": config.workers}
        self.train_data = SplitReader(manifest, "train", **reading)
        self.val_data = SplitReader(manifest, "val", **reading)
        self.optimizer = make_optimizer(model, config, device)
        self.dtype = autocast_dtype(config.precision, device)
        self.scaler = loss_scaler(self.dtype, device)
        self.steps = len(self.train_data) * config.epochs
        self.step, self.validated, self.best = 0, 0, math.inf
        self.origin = config.key(manifest.fingerprint)
        self.tracking = tracking
        self.run_id: str | None = None

    @property
    def best_uri(self) -> str:
        return storage.join(self.config.output, "best")

    def to_the_end(self) -> Trained:
        self._resume()
        run = self.tracking.start(self.config.name, self.run_id, params=self.config.to_dict(), tags=self._tags())
        self.run_id = run.run_id
        with run, Progress(f"train {self.config.name}", self.steps, "steps") as progress:
            progress.done = self.step
            progress.resumed = self.step
            while self.validated < self.config.epochs:
                if self.step < (self.validated + 1) * len(self.train_data):  # else a kill fell before the validation
                    self._epoch(run, progress)
                loss = self._validate()
                run.log({"val_loss": loss}, self.step)
                if not math.isfinite(loss):
                    raise WorkError(
                        f"{self.config.name}: the validation loss is {loss} after step {self.step}; the best model so "
                        f"far is kept; lower the learning rate ({self.config.learning_rate}) or train in float32"
                    )
                if loss < self.best:
                    self.best = loss
                    self._save_best()
                self.validated += 1
                self._checkpoint()
        return Trained(self.best_uri, self.best, self.step, self.run_id)

    def _tags(self) -> dict[str, str]:
        counts = ", ".join(f"{split} {count}" for split, count in self.manifest.counts.items())
        return {"captioner.data_fingerprint": self.manifest.fingerprint, "captioner.data_counts": counts}

    def _epoch(self, run: Any, progress: Progress) -> None:
        """Train to the end of the current epoch, from wherever in it the run stands."""
        epoch, skip = divmod(self.step, len(self.train_data))
        self.model.train()
        saved, spoken, pictures = time.monotonic(), time.monotonic(), 0
        for batch in self.train_data.batches(seed=self.config.seed, epoch=epoch, skip=skip):
            loss, rate = self._train_step(batch)
            self.step += 1
            pictures += len(batch.image_ids)
            if self.step % 10 == 0 or self.step == self.steps:
                value, now = float(loss), time.monotonic()
                speed = pictures / max(now - spoken, 1e-9)
                run.log({"train_loss": value, "learning_rate": rate, "pictures_per_second": speed}, self.step)
                spoken, pictures = now, 0
                progress.advance(0, f"loss {value:.3f}")
            progress.advance()
            if time.monotonic() - saved > 60 * self.config.checkpoint_minutes:
                self._checkpoint()
                saved = time.monotonic()

    def _train_step(self, batch: Batch) -> tuple[torch.Tensor, float]:
        """Learn one batch; return the mean loss a token (on the device) and the learning rate."""
        rate = learning_rate(self.step, self.steps, self.config.learning_rate, self.config.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total, count = self._loss(batch)
        loss = total / count
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach(), rate

    def _loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        ids = encode_captions(
            self.model.tokenizer, batch.captions, self.config.captions_per_picture, self.config.max_tokens
        )
        pixels = torch.from_numpy(batch.pixels).to(self.device, non_blocking=True)
        tokens, targets = ids.to(self.device, non_blocking=True)
        with autocast(self.dtype, self.device):
            return caption_loss(self.model, pixels, tokens, targets)

    @torch.no_grad()
    def _validate(self) -> float:
        """Return the mean cross-entropy a token over the validation captions."""
        self.model.eval()
        losses, tokens = 0.0, 0
        for batch in self.val_data.batches():
            total, count = self._loss(batch)
            losses, tokens = losses + float(total), tokens + int(count)
        return losses / tokens

    def _save_best(self) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            self.model.save_pretrained(scratch)
            storage.upload_folder(scratch, self.best_uri)
        about = {
            "name": self.config.name,
            "step": self.step,
            "validation_loss": self.best,
            "mlflow_run_id": self.run_id,
            "data_fingerprint": self.manifest.fingerprint,
            "configuration": self.config.to_dict(),
        }
        storage.write_json(storage.join(self.best_uri, "training.json"), about)

    def _checkpoint(self) -> None:
        state = {
            "step": self.step,
            "validated": self.validated,
            "best": self.best if math.isfinite(self.best) else None,
            "origin": self.origin,
            "run_id": self.run_id,
            "scaler": self.scaler.state_dict(),
            "configuration": self.config.to_dict(),
        }
        checkpoint.save(self.config.output, self.step, self.model, self.optimizer, state)

    def _resume(self) -> None:
        folder = checkpoint.newest(self.config.output)
        if folder is None:
            return
        state = checkpoint.read_state(folder)
        if state["origin"] != self.origin:
            raise UserError(
                f"{self.config.output}: holds a run with other options or data; choose another output or delete it"
            )
        checkpoint.restore(folder, self.model, self.optimizer)
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.validated, self.run_id = state["step"], state["validated"], state["run_id"]
        self.best = math.inf if state["best"] is None else state["best"]
        log.warning("resuming %s at step %d of %d", self.config.name, self.step, self.steps)
