"""Training one candidate, from the data set's manifest to the best model.

The story of a run: build the model and its tokenizer, resume from the newest whole checkpoint if there is one, pass
over the pictures, and at each validation measure loss and CIDEr, keep the model if it is the best so far, and write a
checkpoint. Where it stands is a count of steps, from which the order of the data, the views of the pictures and the
learning rate follow.
"""

import hashlib
import logging
import math
import shutil
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from model_lib import checkpoint, storage
from model_lib.averaging import MovingAverage
from model_lib.config import TrainConfig
from model_lib.errors import UserError, WorkError
from model_lib.features import FeatureCache
from model_lib.model import Captioner
from model_lib.objectives import Objective, SelfCritical, captions_of, loss_of
from model_lib.pictures import augmented
from model_lib.precision import autocast, autocast_dtype, choose_device, loss_scaler
from model_lib.presets import PRESETS
from model_lib.progress import INTERVAL, Progress
from model_lib.shards import AHEAD, Manifest, Plan, SplitReader, ahead, read_manifest
from model_lib.sources import lasting_source
from model_lib.tokens import encode_captions, train_tokenizer
from model_lib.tracking import NO_TRACKING, Tracking
from model_lib.validation import Standing, Validator

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """What a finished run leaves behind."""

    model: str
    """Folder or URI of the best model, self-contained."""
    validation_loss: float
    """Its mean cross-entropy in nats a token, on as many captions a validation picture as it learns from."""
    validation_cider: float
    """Its CIDEr on the validation pictures, greedy and plainly split: what the best model is chosen by."""
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
    if config.start is not None:
        config = replace(config, start=lasting_source(config.start))
    torch.manual_seed(config.seed)
    device = choose_device(config.device)
    model = build_model(config, manifest).to(device)
    return _Run(config, manifest, model, device, tracking).to_the_end()


def build_model(config: TrainConfig, manifest: Manifest) -> Captioner:
    """Return the captioner to train: a trained one, the preset's parts, or one from scratch with its own tokenizer."""
    preset = PRESETS[config.preset]
    if config.start is not None:
        model = Captioner.from_pretrained(config.start, device="cpu", dtype=torch.float32).train()
        if model.config.train_everything != (preset.vision is None):
            kind = "from scratch, as by preset tiny" if model.config.train_everything else "over frozen parts"
            raise UserError(f"{config.start}: was trained {kind}, which preset {config.preset} does not do")
        return model
    if preset.vision is not None and preset.decoder is not None:
        return Captioner.from_parts(config.vision or preset.vision, config.decoder or preset.decoder, config.tokenizer)
    captions = SplitReader(manifest, "train", size=1).captions()
    tokenizer = train_tokenizer((text for texts in captions for text in texts), preset.decoder_shape["vocab_size"])
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = Captioner(preset.config(vocab_size=len(tokenizer), **ends))
    model.tokenizer = tokenizer
    return model


def _identity(model: Captioner) -> str:
    """Return what tells a trained captioner from others, whatever its folder is called."""
    return hashlib.sha256(model.head.weight.detach().float().cpu().numpy().tobytes()).hexdigest()


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
        if config.max_tokens >= positions:
            raise UserError(f"max_tokens: {config.max_tokens} leaves no place for the end in {positions} positions")
        reading = {"size": model.image_size, "workers": config.workers}
        self.train_data = SplitReader(manifest, "train", **reading)
        self.validator = Validator(config, manifest, model.image_size)
        self.texts = self.train_data.captions()
        ids = encode_captions(model.tokenizer, self.texts, config.captions_per_picture, config.max_tokens)
        self.lengths = np.array([sum(map(len, picture)) for picture in ids])
        self.objective: Objective = captions_of(ids, model.tokenizer.eos_token_id)
        self.critic = SelfCritical(self.texts, config) if config.objective == "self-critical" else None
        if self.critic is not None:
            self.objective = self.critic.draw
            log.warning("reward: %s", ", ".join(f"{name} {value}" for name, value in self.critic.describe().items()))

        self.dtype = autocast_dtype(config.precision, device)
        self.scaler = loss_scaler(self.dtype, device)
        self._prepare_model()
        self.optimizer = make_optimizer(model, config, device)
        self.average = MovingAverage(model, config.ema or 0.0)
        self.cache: FeatureCache | None = None
        self.epoch_steps = -(-self.train_data.rows // config.batch_size)
        self.steps = self.epoch_steps * config.epochs
        self.step, self.validated, self.stale = 0, 0, 0
        self.best: Standing | None = None
        self.origin = config.key(manifest.fingerprint, *([] if config.start is None else [_identity(model)]))
        self.tracking = tracking
        self.run_id: str | None = None

    def _prepare_model(self) -> None:
        model, config = self.model, self.config
        if self.dtype != torch.float32:
            model.freeze_into(self.dtype)
        compiler = "g++" if self.device.type == "cpu" else "gcc"
        if config.compile and shutil.which(compiler) is None:
            raise UserError(f"compile: torch.compile needs {compiler} here (apt-get install {compiler})")
        for block in model.decoder.blocks:
            block.dropout.p = config.dropout or 0.0
            if config.compile:
                block.compile(dynamic=True)
        model.decoder.recompute = config.recompute

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

    def to_the_end(self) -> Trained:
        self._resume()
        params = self.config.to_dict()
        if self.critic is not None:
            params |= {f"reward_{name}": value for name, value in self.critic.describe().items()}
        run = self.tracking.start(self.config.name, self.run_id, params=params, tags=self._tags())
        self.run_id = run.run_id
        if self.config.feature_cache is not None and not self.finished:
            self.cache = FeatureCache(
                self.config.feature_cache,
                self.model,
                self.train_data,
                self.manifest.fingerprint,
                self.config.batch_size,
            )
        with run, Progress(f"train {self.config.name}", self.steps, "steps", resumed=self.step) as progress:
            while not self.finished:
                if self._due:
                    self._validate(run)
                else:
                    self._epoch(run, progress)
        assert self.best is not None
        return Trained(self.best_uri, -self.best.negative_loss, self.best.cider, self.step, self.run_id)

    def _tags(self) -> dict[str, str]:
        counts = ", ".join(f"{split} {count}" for split, count in self.manifest.counts.items())
        return {"captioner.data_fingerprint": self.manifest.fingerprint, "captioner.data_counts": counts}

    # ---- learning --------------------------------------------------------------------------------------------

    def _epoch(self, run: Any, progress: Progress) -> None:
        """Train to the next validation or the epoch's end, from wherever in it the run stands."""
        epoch, skip = divmod(self.step, self.epoch_steps)
        self.model.train()
        saved, spoken, pictures = time.monotonic(), time.monotonic(), 0
        config = self.config
        order = self.train_data.shuffled(config.batch_size, config.seed, epoch, self.lengths, config.sort_batches)
        plan = order[skip:]
        with closing(ahead(self._pictures(plan, epoch), AHEAD)) as batches:
            for numbers, pixels in batches:
                measured = self._train_step(numbers, pixels)
                self.step += 1
                pictures += len(numbers)
                if self.step % 10 == 0 or self.step == self.steps or time.monotonic() - spoken > INTERVAL:
                    values, now = {name: float(value) for name, value in measured.items()}, time.monotonic()
                    speed = pictures / max(now - spoken, 1e-9)
                    run.log({**values, "pictures_per_second": speed}, self.step)
                    spoken, pictures = now, 0
                    shown = "train_loss" if self.critic is None else "reward"
                    progress.advance(0, f"{shown} {values[shown]:.3f}, {speed:,.1f} pictures a second")
                progress.advance()
                if time.monotonic() - saved > 60 * self.config.checkpoint_minutes:
                    self._checkpoint()
                    saved = time.monotonic()
                if self._due:
                    return

    def _pictures(self, plan: Plan, epoch: int) -> Generator[tuple[Sequence[int], Tensor]]:
        """Yield the numbers of each batch's pictures, with their pixels, or with their features from the cache."""

        def pinned(values: Tensor) -> Tensor:
            return values.pin_memory() if self.device.type == "cuda" else values

        if self.cache is not None:
            for numbers in plan:
                yield numbers.tolist(), pinned(self.cache.read(numbers))
            return

        def view(image: Image.Image, number: int) -> np.ndarray:
            rng = np.random.default_rng([self.config.seed, epoch, number])
            return augmented(image, self.model.image_size, self.texts[number], rng)

        for batch in self.train_data.batches(plan, view if self.config.augment == "yes" else None):
            yield batch.numbers, pinned(torch.from_numpy(batch.pixels))

    def _encode(self, pixels: Tensor) -> Tensor:
        """Return the visual tokens of pixels or cached features, on the device."""
        pixels = pixels.to(self.device, non_blocking=True)
        if self.cache is not None and pixels.dtype != torch.uint8:
            return pixels
        if self.model.config.train_everything:
            with autocast(self.dtype, self.device):
                return self.model.encode(pixels)
        return self.model.encode(pixels)  # its weights are in the right format already

    def _train_step(self, numbers: Sequence[int], pixels: Tensor) -> dict[str, Tensor | float]:
        """Learn one batch; return what to log, on the device still."""
        rate = learning_rate(self.step, self.steps, self.config.learning_rate, self.config.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        size = self.config.micro_batch_size or len(numbers)
        parts = [slice(start, start + size) for start in range(0, len(numbers), size)]
        losses, amount, rewards, expected = torch.zeros((), device=self.device), 0, [], 0
        for part in parts:
            features = self._encode(pixels[part])
            with autocast(self.dtype, self.device):
                learned = self.objective(self.model, features, numbers[part], self.step)
            with autocast(self.dtype, self.device):  # anew: what it cast while drawing cannot take gradients
                loss = loss_of(self.model, features, learned, self._smoothing)
            expected = expected or learned.amount * len(parts)
            self.scaler.scale(loss / expected).backward()
            losses, amount = losses + loss.detach(), amount + learned.amount
            rewards.append(learned.reward or 0.0)
        self.scaler.unscale_(self.optimizer)
        trained = [p for p in self.model.parameters() if p.grad is not None]
        if amount != expected:  # the mean, whatever the parts
            torch._foreach_mul_([p.grad for p in trained], expected / amount)
        norm = nn.utils.clip_grad_norm_(trained, self.config.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update()
        measured: dict[str, Tensor | float] = {
            "train_loss": losses / amount,
            "learning_rate": rate,
            "gradient_norm": norm,
        }
        if self.critic is not None:
            measured["reward"] = sum(rewards) / len(rewards)
        return measured

    @property
    def _smoothing(self) -> float:
        return 0.0 if self.critic is not None else self.config.label_smoothing or 0.0

    # ---- judging ---------------------------------------------------------------------------------------------

    def _validate(self, run: Any) -> None:
        """Judge the model, keep it if it is the best so far, and write a checkpoint."""
        with self.average.applied():
            scores = self.validator.measure(self.model, self._encode, self.dtype)
            run.log(scores, self.step)
            loss = scores["val_loss"]
            if not math.isfinite(loss):
                raise WorkError(
                    f"{self.config.name}: the validation loss is {loss} after step {self.step}; the best model so far "
                    f"is kept; lower the learning rate ({self.config.learning_rate}) or train in float32"
                )
            standing = Standing(scores["val_slice_CIDEr"], -loss)
            self.stale += 1
            if self.best is None or standing > self.best:
                self.best, self.stale = standing, 0
                self._save_best(scores)
        self.validated = self.step
        self._checkpoint()

    def _save_best(self, scores: dict[str, float]) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            state = {name: tensor.detach().to("cpu", torch.float32) for name, tensor in self.model.state_dict().items()}
            self.model.save_pretrained(scratch, state_dict=state)
            storage.upload_folder(scratch, self.best_uri)
        about = {
            "name": self.config.name,
            "step": self.step,
            "validation_loss": scores["val_loss"],
            "validation_cider": scores["val_slice_CIDEr"],
            "mlflow_run_id": self.run_id,
            "data_fingerprint": self.manifest.fingerprint,
            "configuration": self.config.to_dict(),
        }
        storage.write_json(storage.join(self.best_uri, "training.json"), about)

    # ---- surviving -------------------------------------------------------------------------------------------

    def _checkpoint(self) -> None:
        state = {
            "step": self.step,
            "validated": self.validated,
            "stale": self.stale,
            "best": None if self.best is None else [self.best.cider, self.best.negative_loss],
            "averaged": self.average.updates,
            "origin": self.origin,
            "run_id": self.run_id,
            "scaler": self.scaler.state_dict(),
            "configuration": self.config.to_dict(),
        }
        checkpoint.save(self.config.output, self.step, self.model, self.optimizer, self.average.state(), state)

    def _resume(self) -> None:
        folder = checkpoint.newest(self.config.output)
        if folder is None:
            return
        state = checkpoint.read_state(folder)
        if state["origin"] != self.origin:
            raise UserError(
                f"{self.config.output}: holds a run with other options or data; choose another output or delete it"
            )
        averages = checkpoint.restore(folder, self.model, self.optimizer)
        self.average.restore(averages, state["averaged"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.validated, self.stale = state["step"], state["validated"], state["stale"]
        self.run_id = state["run_id"]
        self.best = None if state["best"] is None else Standing(*state["best"])
        log.warning("resuming %s at step %d of %d", self.config.name, self.step, self.steps)
