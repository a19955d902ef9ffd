"""The configuration of training, and its result."""

import re
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from model_lib.model.sources import lasting_source
from model_lib.options import Precision, StageConfig, option, require
from model_lib.presets import DEFAULT_PRESET, PRESETS

SELF_CRITICAL_SLOWDOWN = 20
"""Factor by which self-critical training's default learning rate is lower."""
LONGEST_DRAWN = 30
"""Tokens of a caption that self-critical training draws."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(StageConfig):
    """Train one candidate; started again with the same options, it resumes."""

    data: str = option(shapes=False)
    """Folder, URI or manifest.json that ingest made."""
    output: str = option(shapes=False)
    """Folder or URI for checkpoints and the best model."""
    name: str = option("candidate", shapes=False)
    """Name of the candidate in MLflow and in the summary: letters, digits, dots, dashes and
    underscores."""
    preset: str = DEFAULT_PRESET
    """Model size: clip-l-gpt2-medium, clip-l-336-gpt2-medium, siglip2-l-gpt2-medium, or tiny (from
    scratch, for a try without weights)."""
    vision: str | None = None
    """Hub name (owner/name or owner/name@revision), folder or URI of another CLIP or SigLIP than
    the preset's."""
    decoder: str | None = None
    """Hub name, folder or URI of another GPT-2 than the preset's."""
    tokenizer: str | None = None
    """Hub name, folder or URI of the tokenizer; by default the decoder's own."""
    vision_layer: int = -1
    """Hidden layer of the vision tower that the decoder attends to: -1 the last, -2 the one
    before."""
    epochs: int | None = option(None, minimum=1)
    """Passes over the training images; by default the preset's."""
    batch_size: int | None = option(None, minimum=1)
    """Images a step, each with its captions; by default the preset's."""
    learning_rate: float | None = None
    """Peak of the schedule; by default the preset's, in self-critical training a twentieth of
    it."""
    pretrained_learning_rate: float | None = None
    """The same of the decoder's trained weights that come from GPT-2; by default, as of the new
    cross-attention."""
    unfreeze_vision: int = option(0, minimum=0)
    """Last layers of the vision tower that are trained too."""
    vision_learning_rate: float = 1e-5
    """The same of these layers."""
    warmup: float = option(0.05, minimum=0)
    """Share of the steps over which the learning rate rises, before it falls as a cosine."""
    weight_decay: float = option(0.01, minimum=0)
    """AdamW's decay of matrices (not of norms and biases)."""
    clip_norm: float = option(1.0, minimum=0)
    """Upper bound of the gradient's norm."""
    caption_style: Literal["coco", "raw"] = "raw"
    """How captions are learned, and so written: coco, in lower case and without the final stop, as
    COCO's scores read them; raw, as they are."""
    resize: Literal["squash", "crop"] | None = None
    """From an image to the vision tower's square: squash shows all of it, crop its centre. By
    default as the tower's image processor, or the model to go on from, does."""
    captions_per_image: int = option(5, minimum=1)
    """Captions of an image learned in one step; those beyond are left out."""
    max_tokens: int | None = option(None, minimum=4)
    """Longer captions are cut to this many tokens, and drawn ones end there; by default the
    preset's, in self-critical training 30 at most."""
    label_smoothing: float | None = option(None, minimum=0)
    """Share of the target spread over the vocabulary; by default the preset's."""
    dropout: float | None = option(None, minimum=0)
    """Dropout of the cross-attention and feed-forward blocks' results; by default the preset's, in
    self-critical training 0."""
    ema: float | None = option(None, minimum=0)
    """Decay of the moving average of the weights that is evaluated and kept; 0: none; by default
    the preset's."""
    augment: bool | None = None
    """Learn random crops, mirrored if no caption says left or right; by default the preset's."""
    sort_batches: int | None = option(None, minimum=1)
    """Batches' worth of images sorted by the length of their captions, to save padding; 1: none; by
    default the preset's."""
    objective: Literal["cross-entropy", "self-critical"] = "cross-entropy"
    """Learn the captions, or, as a second stage, raise the CIDEr-D of captions that the model
    draws."""
    init_from: str | None = None
    """A trained captioner to go on from: a folder, hub name, URI or models:/captioner@champion."""
    num_samples: int = option(5, minimum=2)
    """Captions drawn for an image in self-critical training; each one's baseline is the others'
    mean reward."""
    validate_every: int = option(0, minimum=0)
    """Steps between two validations; 0: one at each epoch's end."""
    validation_images: int = option(1000, minimum=0)
    """First so many validation images to validate on, and as many of the training images; 0:
    all."""
    patience: int | None = option(None, minimum=0)
    """Stop after so many validations in a row without a better CIDEr; 0: never; by default the
    preset's."""
    micro_batch_size: int = option(0, minimum=0, shapes=False)
    """Images that go through the model at once in each process, their gradients added up to a
    step's; 0: its whole share. In self-critical training it changes which captions are drawn."""
    recompute: bool = option(False, shapes=False)
    """Compute each layer again in the backward pass (gradient checkpointing): less memory, more
    time."""
    compile: bool | None = option(None, shapes=False)
    """Compile the model's layers and the loss with torch.compile; by default on CUDA, if there is a
    compiler."""
    precision: Precision | None = None
    """By default the preset's; auto: bfloat16 where the device has it, else float16 on a GPU, or
    float32."""
    seed: int = option(0, minimum=0)
    """Seed of the new weights, the order of the images, their views and drawn captions."""
    device: str = option("auto", shapes=False)
    """auto, cpu, cuda or mps."""
    workers: int = option(0, minimum=0, shapes=False)
    """Threads that decode images in each process; 0: its share of the cores."""
    processes: int = option(0, minimum=0, shapes=False)
    """Processes of this machine that share each step's images; 0: one a GPU, or one."""
    checkpoint_minutes: float = option(10.0, minimum=0, shapes=False)
    """Longest time between two checkpoints; each validation writes one too. Training goes on
    meanwhile."""
    checkpoint_steps: int = option(0, minimum=0, shapes=False)
    """Most steps between two checkpoints; 0: as many as the minutes allow."""
    checkpoints_kept: int = option(2, minimum=1, shapes=False)
    """Newest checkpoints to keep."""
    log_steps: int = option(10, minimum=1, shapes=False)
    """Steps between two points of MLflow's curves, unless they take more than a few seconds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        presets = ", ".join(PRESETS)
        require(self.preset in PRESETS, f"preset {self.preset!r}: unknown; one of {presets}")
        is_name = re.fullmatch(r"\w[\w.-]*", self.name) is not None
        require(is_name, f"name {self.name!r}: use letters, digits, . - _ only")
        for name in ("learning_rate", "pretrained_learning_rate", "vision_learning_rate"):
            rate = getattr(self, name)
            require(rate is None or rate > 0, f"{name}: {rate} is not above 0")
        for name in ("warmup", "label_smoothing", "dropout", "ema"):
            value = getattr(self, name)
            require(value is None or value < 1, f"{name}: {value} is not less than 1")
        require(self.vision_layer < 0, f"vision_layer: {self.vision_layer} is not below 0")
        is_pretrained = PRESETS[self.preset].vision is not None
        require(
            is_pretrained or (self.pretrained_learning_rate, self.unfreeze_vision) == (None, 0),
            f"preset {self.preset}: is trained whole from scratch, so pretrained_learning_rate and "
            "unfreeze_vision have no meaning",
        )
        if (self.vision, self.decoder, self.tokenizer) != (None, None, None):
            require(
                is_pretrained,
                f"preset {self.preset}: is trained from scratch and takes no vision, decoder or "
                "tokenizer",
            )
            require(
                self.init_from is None,
                "init_from: a trained captioner has its own vision, decoder and tokenizer; give "
                "either it or them",
            )
        if self.objective == "self-critical":
            require(
                self.init_from is not None,
                "objective self-critical: needs a trained captioner to go on from; give "
                "--init_from",
            )
            require(
                not self.label_smoothing,
                "label_smoothing: self-critical training has no labels to smooth",
            )


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig(TrainConfig):
    """A configuration with the preset's values in place of None."""

    epochs: int
    batch_size: int
    learning_rate: float
    patience: int
    label_smoothing: float
    dropout: float
    ema: float
    augment: bool
    sort_batches: int
    max_tokens: int
    precision: Precision


def resolve(config: TrainConfig) -> ResolvedConfig:
    """Return the configuration with the preset's values in place of None."""
    preset = PRESETS[config.preset]
    defaults: dict[str, Any] = dict(vars(preset))
    if config.init_from is not None:  # it has its own
        defaults |= {"vision": None, "decoder": None}
    if config.objective == "self-critical":
        # With dropout, the model that learns would not be the one that drew.
        defaults |= {"label_smoothing": 0.0, "dropout": 0.0}
        defaults["max_tokens"] = min(preset.max_tokens, LONGEST_DRAWN)
        defaults["learning_rate"] /= SELF_CRITICAL_SLOWDOWN
    set_values = {name: value for name, value in vars(config).items() if value is not None}
    names = {field.name for field in fields(ResolvedConfig)}
    return ResolvedConfig(**{name: defaults[name] for name in names & defaults.keys()} | set_values)


def pin_sources(config: ResolvedConfig) -> ResolvedConfig:
    """Return the configuration with sources that mean the same later (see `lasting_source`)."""
    names = ("vision", "decoder", "tokenizer", "init_from")
    sources = {name: getattr(config, name) for name in names}
    pinned: dict[str, Any] = {
        name: lasting_source(uri) for name, uri in sources.items() if uri is not None
    }
    return replace(config, **pinned)


@dataclass(frozen=True)
class Trained:
    """The result of a finished run."""

    model: str
    """Folder or URI of the best model, self-contained."""
    validation_loss: float
    """Its mean cross-entropy in nats a token, on as many captions a validation image as it learns
    from."""
    validation_cider: float
    """Its CIDEr on the validation images, greedy and plainly split: what the best model is chosen
    by."""
    steps: int
    run_id: str | None
    """The MLflow run."""
